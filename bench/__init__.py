"""Benchmarks; each runs from a checkout, installed or not, and writes JSON that says where it was measured.

    eager_vs_compiled   speed-up of an optimised model, eager and compiled, interleaved
    optimize_time       what optimising costs beside torch.export
    cost_model          predicted against measured speed-up, over models and budgets
    schedule_times      the chosen schedule and uniform counts, compiled, in one run
    schedules           what each way of choosing a schedule costs in accuracy, on the digit nets
    accuracy            what every strategy costs in accuracy, at equal FLOPs, on nets trained on three tasks
    tuning              GTP's numbers chosen without labels, against a grid with them
    imagenet            top-1 and top-5 of a model and its optimised form on a real image set; torchrun
    finetune            self-distillation through the optimised graph
    digit_nets          small nets trained on digits that come with scikit-learn, for accuracy; `pip install -e ".[bench]"`
    export_times        speed-up in onnxruntime and as an AOTInductor package
    fuzz                random models held to what is promised of every model
    gpu_quarter         a quarter of an hour on one GPU: kernels checked and timed, models, by operator, and what would help
    gpu_traffic         what GTP's operators launch and move on an H100, counted in generated code, without a GPU
    zoo                 which models the compiler can reduce

Results that the README quotes are in results/.
"""
