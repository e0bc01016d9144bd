"""Benchmarks. Each runs from a checkout, installed or not, and writes JSON that records where it was measured.

    eager_vs_compiled   speed-up of an optimised model, eager and compiled, interleaved
    optimize_time       time that optimising takes, compared with torch.export alone
    cost_model          predicted against measured speed-up, over models and budgets
    schedule_times      the chosen schedule against uniform counts, compiled, in one run
    schedules           what each way of choosing a schedule costs in accuracy, on the digit nets
    accuracy            what every strategy costs in accuracy, at equal FLOPs, on nets trained on three tasks
    tuning              GTP's parameters chosen without labels, against a grid search with labels
    imagenet            top-1 and top-5, or agreement, of a model and its optimised form on a real image set; torchrun
    finetune            self-distillation through the optimised graph
    digit_nets          small nets trained on scikit-learn's digits, to measure accuracy; `pip install -e ".[bench]"`
    export_times        speed-up in onnxruntime and as an AOTInductor package
    fuzz                random models, checked against what gtp_fx promises for every model
    gpu_quarter         a quarter of an hour on one GPU: kernels checked and timed, whole models, and ablations
    gpu_traffic         launches and bytes moved by GTP's operators on an H100, counted in generated code without a GPU
    zoo                 which models the compiler can reduce

Results that the README quotes are in results/.
"""
