"""Any CPU: one core's nominal rates, times torch's threads. `gtp-fx tune` measures this machine's own."""

from gtp_fx.targets.target import Curve, Target

CPU = Target(
    name="cpu",
    device="cpu",
    dense={"float32": 72e9, "bfloat16": 72e9},
    bandwidth=10e9,
    launch=5e-6,
    curves={
        "product": Curve(((1e6, 0.5), (1e8, 0.9), (1e10, 1.0))),
        "convolution": Curve(((1e6, 0.4), (1e8, 0.7))),
        "attention": Curve(((64, 0.4), (256, 0.6))),
        "scores": Curve(((1e6, 0.5),)),
        "stream": Curve(((1e5, 2.0), (1e8, 1.0))),
        "gather": Curve(((1e6, 0.5),)),
        "neighbors": Curve(((1e4, 0.01),)),
        "sort": Curve(((1e4, 0.01),)),
    },
    sources={
        "dense": "nominal: two 8-wide multiply-adds a cycle at 2.25 GHz",
        "bandwidth": "nominal: a core's share of a server's memory",
        "launch": "nominal: starting and joining a team of threads",
        "curves": "nominal",
        "inductor": "no option pays: bench/results/inductor_options_cpu_1.json and _2.json",
    },
)
