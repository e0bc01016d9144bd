"""What `bench.gpu_quarter` runs on a GPU, without one: its own code on toy sizes, and that it says so where something
is wrong.

All its stages together, on toy sizes: `python -m bench.gpu_quarter first --out DIR --dry-run`, three to five minutes of
one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from bench import gpu_kernels, gpu_models, gpu_quarter, gpu_tiles, gpu_wrong, interpreter
from bench.gpu_answers import answers
from bench.gpu_check import Check
from bench.gpu_checks import DRY, cases
from bench.gpu_contenders import BASELINES, VARIANTS, Contender, compiled
from bench.gpu_plan import KERNELS, OPTIONS
from bench.gpu_profile import group_of, summed
from bench.gpu_sweep import steps
from bench.gpu_turns import Turn
from gtp_fx.kernels.available import load_kernels
from gtp_fx.options.options import Options
from gtp_fx.targets import detect
from gtp_fx.targets.target import SCALE_FORMS

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run wants Triton's interpreter")


@pytest.mark.nightly
@needs_no_gpu
def test_kernels_are_right_and_each_is_checked() -> None:
    load_kernels()
    made = list(cases(DRY, [torch.bfloat16, torch.float32]))
    assert {name for case in made for name in case.kernels} == set(KERNELS)
    wrong = [check for case in made for check in case.checks(CPU) if not check.right]
    assert not wrong


@needs_no_gpu
def test_a_kernel_that_leaves_its_output_unwritten_or_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load_kernels()
    recover = torch.ops.gtp_fx_kernels.recover

    def forgetful(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.empty_like(recover(x, *rest))

    case = next(case for case in cases(DRY, [torch.float32]) if "propagate" in case.kernels)
    monkeypatch.setattr(torch.ops.gtp_fx_kernels, "recover", forgetful)
    assert {check.kernel for check in case.checks(CPU) if not check.right} == {"recover"}
    monkeypatch.setattr(torch.ops.gtp_fx_kernels, "recover", lambda *_: torch.ops.aten.nothing())
    *_, last = case.checks(CPU)
    assert not last.right and "AttributeError" in last.failed


def test_what_is_wrong_is_told() -> None:
    poison = Check("select", "(1, 2)", "float32", float("nan"), 1e-5)
    assert not poison.right
    checks = [{**vars(check), "right": check.right} for check in (Check("attend", "", "float32", 1e-7, 1e-5), poison)]
    part = {"done": 1, "wanted": 3, "checks": checks}
    told, last = answers({"checks-nets": part}, [])
    assert "WRONG: select at (1, 2) in float32 (nan, tolerance 1.0e-05) (1 of 2 checks, 1 of 3 cases" in told
    assert last == "nothing was left out"


@needs_no_gpu
def test_a_question_is_answered_by_whoever_is_there() -> None:
    load_kernels()
    made = {"adds": lambda: torch.ones(2) + 1, "raises": lambda: torch.ones(2) + torch.ones(3)}
    row = gpu_kernels.question("sum", (2,), (made, {"adds": 24}), CPU).answer(CPU, 2)  # type: ignore[arg-type]
    assert row.seconds.keys() == {"adds"}
    assert row.failed["raises"].startswith("RuntimeError: The size of tensor a")
    (asked,) = gpu_kernels.questions("attention", CPU, torch.float32, gpu_kernels.DRY)
    assert {"cudnn (runs flash)", "flash", "cudnn, mask (runs flash)", "attend, told, scored"} <= asked.answer(
        CPU, 1
    ).seconds.keys()


@pytest.mark.nightly
@needs_no_gpu
def test_a_model_row_says_what_ran_and_claims_no_more(tmp_path: Path) -> None:
    contenders = [Contender(False), Contender(False, attention="flash"), Contender(True), Contender(True, option="no")]
    torch._dynamo.reset()
    prepared = gpu_models.prepare("T", 2, contenders, detect("cpu"), torch.float32, tmp_path / "code")
    row = gpu_models.timed(prepared, 2, Turn(tmp_path, "model-T-2", alone=True))
    assert row.flops_ratio <= 0.6 and sum(row.schedule) > 0 and row.wrong == []
    original, flash, ours, failed = (row.contenders[str(one)] for one in contenders)
    assert ours.error < 1e-3 and len(ours.rounds) == 2 and failed.failed == "KeyError: 'no'" and not failed.rounds
    assert original.attention == flash.attention == {"flash": 2}, "each contender's own code, though it is the same"
    assert row.not_run == tuple(str(one) for one in BASELINES if one not in contenders)
    assert "the fastest of 2, 4 not run" in answers({"model-T-2": row.to_dict()}, [])[0]
    row = gpu_models.by_operator(prepared, row, tmp_path / "traces")
    assert row.profile["ours"].groups["gemm"] > 0
    assert len(list((tmp_path / "code").iterdir())) == 3 and len(list((tmp_path / "traces").iterdir())) == 2


def test_every_variant_and_option_is_one_that_the_backend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Contender, Options] = {}
    target, schedule = detect("cpu"), (0, 0, 0)
    given = [Contender(True, variant=name) for name in ("", *VARIANTS)]
    given += [Contender(True, "reduce-overhead", option=name) for name in OPTIONS]
    for one in given:

        def note(gm: Any, inputs: Any, options: Any, one: Contender = one) -> Any:
            seen[one] = Options.of_backend(options)
            return gm.forward

        torch._dynamo.reset()
        monkeypatch.setattr("bench.gpu_contenders.gtp", note)
        options = gpu_models._options(one.variant, gpu_models.SUBJECTS["S"], schedule * 4)
        compiled(one, torch.nn.Linear(2, 2), torch.ones(1, 2), options, target).run()
    assert list(seen) == given
    assert sum(seen[Contender(True, variant="border")].schedule) == 69  # type: ignore[arg-type]
    assert [seen[Contender(True, variant=f"told{form}")].target.scale_form for form in SCALE_FORMS] == list(SCALE_FORMS)
    assert all(seen[one].target.inductor == OPTIONS[one.option] for one in given if one.option)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>", "gemm"),
        ("triton_tem_fused_addmm_gelu_3", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("attend_kernel", "attention"),
        ("scores_kernel", "score"),
        ("triton_poi_fused_amax_mul_slice_12", "score"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8", "graph"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>", "graph"),
        ("triton_red_fused_clamp_min_div_linalg_vector_norm_0", "graph"),
        ("triton_per_fused_abs_amax_arange_div_eq_remainder_stack_sub_sum_unsqueeze_9", "graph"),
        ("token_graph_kernel", "graph"),
        ("select_kernel", "select"),
        ("propagate_kernel", "propagate"),
        ("triton_per_fused_add_native_layer_norm_5", "pointwise"),
        ("triton_poi_fused_convolution_0", "pointwise"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "conv"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_are_known_by_their_names(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_a_timeline_is_summed_by_call_and_products_by_size() -> None:
    sizes = [[64], [8, 32], [32, 64]]
    events: list[dict[str, Any]] = [
        {"cat": "cpu_op", "name": "aten::addmm", "dur": 9, "args": {"External id": 7, "Input Dims": sizes}},
        {"cat": "kernel", "name": "nvjet_tst_64", "dur": 6.0, "args": {"External id": 7}},
        {"cat": "kernel", "name": "nvjet_tst_64", "dur": 4.0, "args": {"External id": 7}},
        {"cat": "kernel", "name": "select_kernel", "dur": 2.0, "args": {}},
        {"cat": "ac2g", "name": "nvjet_tst_64"},
    ]
    profile = summed(events, 2, ("kernel",))
    assert profile.total == 6.0 and profile.groups["gemm"] == 5.0 and profile.groups["select"] == 1.0
    assert profile.kernels[0] == ("nvjet_tst_64", "gemm", 1.0, 5.0)
    assert profile.products == {"8x32 32x64": (1.0, 5.0)}


@needs_no_gpu
def test_the_interpreter_is_mended_where_a_loop_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton 3.6 does with NumPy 2.4; where that doesn't help, it says what to install."""
    from triton.runtime import interpreter as triton_interpreter

    patch_tensor = triton_interpreter._patch_lang_tensor

    def as_before(tensor: Any, scope: Any) -> None:
        def refuses(self: Any) -> int:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", refuses)

    monkeypatch.setattr(triton_interpreter, "_patch_lang_tensor", as_before)
    assert not interpreter._loops_run()
    interpreter.make_loops_run()
    assert interpreter._loops_run()
    monkeypatch.setattr(interpreter, "_loops_run", lambda: False)
    with pytest.raises(RuntimeError, match=r"pip install 'numpy<2\.4'"):
        interpreter.make_loops_run()


def test_the_best_tile_is_of_told_attention() -> None:
    one, other, third = gpu_tiles.FITTING[:3]
    seconds = {f"told {one}": 1.0, f"told, scored {one}": 3.0, f"told {other}": 2.0, f"told, scored {other}": 1.5}
    row = gpu_kernels.KernelRow("attend", (2, 3, 197, 64), {**seconds, f"plain {third}": 0.1})
    assert gpu_tiles.keep_best(row, CPU, torch.bfloat16) == str(other)


def test_kernels_are_launched_with_other_warps() -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: (grid, arguments, options)

    launch = gpu_wrong._with_options(lambda kernel: kernel, {"num_warps": 1, "num_stages": 1})
    given = launch(Kernel())[(3,)]("x", ROWS=2, num_warps=8)
    assert given == ((3,), ("x",), {"ROWS": 2, "num_warps": 1, "num_stages": 1})


def test_cases_of_a_kernel_come_smallest_first() -> None:
    load_kernels()
    sizes = [torch.Size(case.size).numel() for case in gpu_wrong.cases_of("propagate", small=False)]
    assert sizes == sorted(sizes) and len(sizes) > 3
    with pytest.raises(ValueError, match="no case calls 'nothing'; there are attend"):
        gpu_wrong.cases_of("nothing", small=True)


def test_where_time_steps() -> None:
    assert steps([96, 104, 128, 136], [1.0, 1.09, 1.33, 1.9]) == [136]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["first"], "no NVIDIA GPU here; --dry-run needs none"),
        (["second"], "give one of --sanitize KERNEL, --tiles and --options"),
        (["second", "--tiles", "--options"], "give one of --sanitize KERNEL, --tiles and --options"),
        (["second", "--sanitize", "nothing"], "--sanitize nothing: give attend"),
    ],
)
def test_bad_arguments_are_a_sentence(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_quarter, "_gpus", lambda: 0)
    result = CliRunner().invoke(gpu_quarter.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2 and told in result.output
