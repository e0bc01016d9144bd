"""Sections: what is alike is compiled once, and gives what the graph gives, whatever the batch, with gradients."""

from __future__ import annotations

import operator
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import gtp_fx
from gtp_fx.errors import OptionError
from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import OpenSizes, mode_of, tracing_lock
from gtp_fx.model.backend import gtp
from gtp_fx.model.sections import alike, backend, code, program
from gtp_fx.model.sections.alike import kinds
from gtp_fx.model.sections.backend import InSections
from gtp_fx.model.sections.cut import cut
from gtp_fx.model.sections.first_site import like_the_others
from gtp_fx.model.sections.values import value_of
from gtp_fx.strategies import STRATEGIES

from support.plain_vit import PlainViT, built, images
from support.zoo import in_tiers

COUNTS = (3, 2, 2, 3, 0, 0)
"""Tokens removed at each block. Blocks 1 to 3 have a site and sizes, blocks 4 and 5 have sizes alone."""

OTHER_KINDS = ("gtp", "idle", "halting", "ppt", "semantic")
"""Strategies that hold something else than "tome" does beside a site's tokens."""

SCORES = torch.ops.gtp_fx.attention_with_scores.default

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that Inductor is given for sections; they are run as they are, since code is Inductor's own matter."""
    found: list[fx.GraphModule] = []

    def not_compiled(gm: fx.GraphModule, inputs: Any, options: Any) -> Any:
        found.append(gm)
        return gm

    monkeypatch.setattr(code, "compile_with_inductor", not_compiled)
    return found


def deep() -> nn.Module:
    return built(lambda: PlainViT(depth=len(COUNTS)))


@torch.no_grad()
def test_blocks_with_other_numbers_of_tokens_share_their_code(compiled: list[fx.GraphModule]) -> None:
    model, x = deep(), images()
    fast = gtp_fx.optimize(model, schedule=COUNTS, example_inputs=x, shapes="shared")
    reference = gtp_fx.optimize(model, schedule=COUNTS, example_inputs=x, compile=False)
    torch.testing.assert_close(fast(x), reference(x), rtol=0, atol=0)
    targets = [" ".join(str(node.target) for node in gm.graph.nodes) for gm in compiled]
    assert sum("gelu" in found for found in targets) == 1, "of six: the last one sees the CLS token alone, and is small"
    assert sum("attention_with_scores" in found for found in targets) == 1, "of four: the first one is told sizes of 1"
    assert sum("propagate" in found for found in targets) == 1, "of four, of which three also gather places"
    again = len(compiled)
    torch.testing.assert_close(fast(x.flip(0)), reference(x.flip(0)), rtol=0, atol=0)
    assert len(compiled) == again


@torch.no_grad()
@pytest.mark.parametrize("strategy", in_tiers(["tome", *OTHER_KINDS], *OTHER_KINDS))
def test_strategies_of_every_kind_come_in_sections(strategy: str, compiled: list[fx.GraphModule]) -> None:
    places = STRATEGIES[strategy]().positions(len(COUNTS))
    counts = [count if block in places else 0 for block, count in enumerate(COUNTS)]
    model, options = deep(), {"schedule": counts, "strategy": strategy, "example_inputs": images()}
    fast = gtp_fx.optimize(model, shapes="shared", **options)
    reference = gtp_fx.optimize(model, compile=False, **options)
    for batch in (3, 1):
        torch.testing.assert_close(fast(images(batch)), reference(images(batch)), rtol=0, atol=0)
    assert compiled


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
def test_compiled_sections_give_the_numbers_and_gradients_of_the_graph() -> None:
    counts = COUNTS[:3]  # the second and the third share their code
    model, x = built(lambda: PlainViT(depth=len(counts))), images(2)
    reference = gtp_fx.optimize(model, schedule=counts, example_inputs=x, compile=False)
    fast: Any = torch.compile(model, backend="gtp", options={"schedule": counts, "shapes": "shared"})
    weight = next(iter(model.parameters()))
    gradients = []
    for run in (reference, fast):
        result = run(x)
        (gradient,) = torch.autograd.grad(result.square().sum(), [weight])
        gradients.append((result.detach(), gradient))
    # Two orders of summation in float32, over a few thousand products.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
@torch.no_grad()
def test_compiled_sections_come_back_from_the_compilers_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = built(lambda: PlainViT(depth=3)), images(2)
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        fast = gtp_fx.optimize(model, schedule=(3, 2, 0), example_inputs=x, shapes="shared")
        found.append(fast(x))
    counts = torch._dynamo.utils.counters["inductor"]
    assert counts["fxgraph_cache_hit"] + torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] > 2
    assert counts["fxgraph_cache_miss"] == 0
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("through_dynamo", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_an_open_batch_is_open_in_every_section(compiled: list[fx.GraphModule], through_dynamo: bool) -> None:
    model, counts = built(lambda: PlainViT(depth=3)), COUNTS[:3]
    if through_dynamo:  # its graph comes with real tensors, and is rewritten, so its nodes' values are noted anew
        fast: Any = torch.compile(model, backend=gtp, options={"schedule": counts, "shapes": "shared"})
    else:
        fast = gtp_fx.optimize(model, schedule=counts, example_inputs=images(), shapes="shared")
    reference = gtp_fx.optimize(model, schedule=counts, example_inputs=images(), compile=False)
    for batch in (2, 5):
        fast(images(batch))
    opened = len(compiled)
    scored = [gm for gm in compiled if gm.graph.find_nodes(op="call_function", target=SCORES)]
    assert len(scored) == 2, "of two images, and of any number: the first site is told sizes of 1, whatever the batch"
    for batch in (3, 7):
        x = images(batch)
        torch.testing.assert_close(fast(x), reference(x), rtol=0, atol=0)
    assert len(compiled) == opened


def shortened() -> fx.Graph:
    """Three times the same operators, which leave 8, 6 and 5 of 9 tokens."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 9, 4)
    for count in (8, 6, 5):
        squares = graph.call_function(torch.mul, (x, x))
        longer = graph.call_function(torch.cat, ([x, squares], 1))
        total = graph.call_function(torch.add, (squares, x))
        both = graph.call_function(torch.cat, ([longer, total], 1))
        x = graph.call_function(torch.narrow, (both, 1, 0, count))
    graph.output((x,))
    fx.passes.shape_prop.ShapeProp(fx.GraphModule({}, graph)).propagate(torch.empty(2, 9, 4))
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["val"] = torch.empty(node.meta["tensor_meta"].shape)
    return graph


@pytest.mark.nightly
@torch.no_grad()
def test_threads_that_ask_for_a_new_batch_size_together_compile_it_once(compiled: list[fx.GraphModule]) -> None:
    fast = gtp_fx.optimize(deep(), schedule=COUNTS, example_inputs=images(), shapes="shared")
    fast(images(2))
    once, start = len(compiled), threading.Barrier(3)

    def ask() -> Tensor:
        start.wait()
        with torch.no_grad():
            return fast(images(5))  # type: ignore[no-any-return]

    with ThreadPoolExecutor(3) as pool:
        results = [future.result() for future in [pool.submit(ask) for _ in range(3)]]
    assert len(compiled) == 2 * once
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_cuts_lie_where_least_is_alive_and_sections_are_alike_but_for_numbers() -> None:
    graph = shortened()
    parts = cut(graph)
    assert [[node.target for node in part] for part in parts] == 3 * [
        [torch.mul, torch.cat, torch.add, torch.cat, torch.narrow]
    ]
    first, others = kinds(parts)
    assert [len(kind.sections) for kind in (first, others)] == [1, 2], "an input's sizes are its own"
    assert others.given == ((6, 5),)
    found: Any = torch.arange(72.0).reshape(2, 9, 4)
    expected = fx.GraphModule({}, graph)(found)
    (found,) = first.graph_module(found)
    for count in (6, 5):
        (found,) = others.graph_module(found, count)
    torch.testing.assert_close(found, expected[0])


def test_what_the_compiler_assumed_of_sizes_is_held_against_other_sections() -> None:
    assumed = OpenSizes()
    fake = assumed.fake(torch.empty(120, 4), [("n",), None, None, None])
    number = assumed.integer(120, ("n",))
    with assumed.tracing():
        assert fake.shape[0] == number, "of one key, they are one symbol"
        assert fake.shape[0] > 100
    assert assumed.hold_for([torch.empty(150, 4), 150])
    assert not assumed.hold_for([torch.empty(50, 4), 50])
    assert not assumed.hold_for([torch.empty(150, 4), 151])
    assert not assumed.hold_for([torch.empty(4, 150).T, 150])


def test_what_was_assumed_besides_an_alternative_counts() -> None:
    """A guard may say one thing or another: 3 columns are part of the code in either case.

    So in what the compiler's caches compare, which torch puts together.
    """
    assumed = OpenSizes()
    rows = assumed.fake(torch.empty(8, 3), ["rows", None, None, None]).shape[0]
    number = assumed.integer(7, "number")
    with assumed.tracing():
        assert (rows % 4 == 1) | (rows % 4 == 0)
        assert number > 5
    assert assumed.hold_for([torch.empty(12, 3), 6])
    for tensor, other in ((torch.empty(6, 3), 6), (torch.empty(12, 2), 6), (torch.empty(12, 3), 5)):
        assert not assumed.hold_for([tensor, other])
    shapes = rows.node.shape_env
    kept = shapes.produce_guards_expression([rows, number])
    held = [shapes.evaluate_guards_expression(kept, numbers) for numbers in ([12, 6], [6, 6], [12, 5])]
    assert held == [True, False, False]


def test_numbers_that_differ_by_the_same_everywhere_are_one_symbol() -> None:
    assumed = OpenSizes()
    tokens, patches, other = (9, 8, 6), (8, 7, 5), (5, 4, 3)
    fake = assumed.fake(torch.empty(2, 9), [None, tokens, tokens, None])
    fewer, least = assumed.integer(8, patches), assumed.integer(5, other)
    assert str(fewer) == f"{fake.shape[1]} - 1" and str(least) != str(fake.shape[1])
    with assumed.tracing():
        assert fake.shape[1] - 1 == fewer
    assert assumed.hold_for([torch.empty(2, 8), 7, 4])
    assert not assumed.hold_for([torch.empty(2, 8), 6, 4])


def test_a_difference_that_real_sizes_do_not_have_relates_nothing() -> None:
    assumed = OpenSizes()
    assumed.fake(torch.empty(2, 9), [None, (9, 8), (9, 8), None])
    assumed.integer(7, (8, 7))
    assert assumed.hold_for([torch.empty(2, 8), 7]) and assumed.hold_for([torch.empty(2, 8), 6])


@pytest.mark.parametrize(("device", "as_it_is"), [("cpu", True), ("meta", False)])
def test_on_a_cpu_what_is_small_and_single_is_not_compiled(device: str, as_it_is: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 9, 4, device=device)
    nodes = [graph.call_function(target, (x,)) for target in (torch.sin, torch.cos, torch.cos)]
    nodes.append(graph.call_function(torch.select, (x, 1, 0)))
    for node in nodes:
        node.meta["val"] = node.target(x.meta["val"], *node.args[1:])
    graph.output(tuple(nodes))
    assert [kind.as_it_is for kind in kinds([[node] for node in nodes])] == [False, False, as_it_is]


@pytest.mark.parametrize("target", [torch.conv2d, torch.ops.aten.conv2d.default, torch.nn.functional.linear])
def test_convolutions_are_seen(target: Any) -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    x.meta["val"], weight.meta["val"] = torch.empty(2, 4, 4, 4), torch.empty(4, 4, 1, 1)
    node = graph.call_function(target, (x, weight))
    node.meta["val"] = x.meta["val"]
    graph.output(node)
    (kind,) = kinds([[node]])
    assert kind.convolves == (target is not torch.nn.functional.linear)


def test_only_attention_that_others_are_told_scales_like_is_told_some() -> None:
    graph = fx.Graph()
    stream = graph.placeholder("x")
    stream.meta["val"] = torch.empty(2, 3, 9, 4)
    scored = graph.call_function(SCORES, (stream, stream, stream, None, None, 1.0, "broadcast-mean", 1, 0))
    graph.output((scored,))
    like_the_others(graph)
    assert len(graph.nodes) == 3


def test_of_one_image_strides_without_meaning_are_as_usual() -> None:
    kept = torch.arange(36).view(1, 36)[:, :31]
    assert code._as_usual(kept).stride() == (31, 1) and kept.stride() == (36, 1)
    assert torch.equal(code._as_usual(kept), kept)
    turned = torch.empty(1, 4, 5).mT
    assert code._as_usual(turned) is turned


def test_numbers_that_are_no_sizes_may_be_negative_and_tensors_may_begin_anywhere() -> None:
    assumed = OpenSizes()
    fake = assumed.fake(torch.empty(2, 9)[:, 2:], [None, ("n",), None, None])
    last = assumed.integer(-5, ("last",))
    with assumed.tracing(), mode_of(fake):
        assert last < 0 and fake[:, last:].shape[1] == 5
    assert assumed.hold_for([torch.empty(2, 9)[:, 3:], -5])
    assert not assumed.hold_for([torch.empty(2, 9)[:, 3:], 5])


def test_the_compiler_may_rewrite_what_it_is_given_and_nothing_else_is_traced_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free: list[bool] = []

    def lock_is_free() -> bool:
        lock: Any = tracing_lock()
        if acquired := lock.acquire(blocking=False):
            lock.release()
        return bool(acquired)

    def rewrites(gm: fx.GraphModule, inputs: Any, options: Any) -> Any:
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(lock_is_free).result())
        own = edit.copy_of(gm)
        gm.graph = fx.Graph()
        if len(inputs) > 1:
            assert inputs[1] in (5, 6)  # an assumption of the symbol's value
        return own

    monkeypatch.setattr(code, "compile_with_inductor", rewrites)
    graph = shortened()
    x = torch.arange(72.0).reshape(2, 9, 4)
    gm = fx.GraphModule({}, graph)
    torch.testing.assert_close(program.Program(gm, kinds(cut(graph)), {})(x), gm(x))
    assert free == [False] * 3, "once for the first section, and for each of two that its assumption keeps apart"


def test_what_another_section_returned_is_as_it_is_and_not_as_its_fake_was(compiled: list[fx.GraphModule]) -> None:
    served = code.Code(kinds(cut(shortened()))[1], {})
    x = torch.empty(2, 8, 4)
    for strided in (x, x.flip(0), torch.empty(2, 4, 8).mT):
        served.bound([strided], (6,))
    assert len(compiled) == 2, "strides that the fakes don't tell apart"


def test_a_stride_that_is_not_what_its_fake_has_is_a_number() -> None:
    """As of one image, or of a slice: sizes that other values share are symbols, and this stride isn't one of them."""
    assumed = OpenSizes()
    fake = assumed.fake(torch.empty(2, 36)[:, :33], [None, "n", "n", None])
    size = assumed.integer(33, "n")
    assert fake.shape[1] == size and fake.stride() == (36, 1)
    assert assumed.hold_for([torch.empty(2, 36)[:, :31], 31])
    assert not assumed.hold_for([torch.empty(2, 31), 31])


@pytest.mark.nightly
@torch.no_grad()
def test_a_section_of_one_image_has_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    compiles = 0

    def not_compiled(gm: fx.GraphModule, inputs: Any, options: Any) -> Any:
        nonlocal compiles
        compiles += 1
        own = edit.copy_of(gm)

        def run(*values: Any) -> Any:
            # Each symbol of a size is an argument as well, and has that size's value.
            sizes = {
                str(fake): value for fake, value in zip(inputs, values, strict=True) if not isinstance(fake, Tensor)
            }
            for fake, value in zip(inputs, values, strict=True):
                if isinstance(fake, Tensor):
                    pairs = zip(fake.shape, value.shape, strict=True)
                    asked.extend((sizes[str(size)], real) for size, real in pairs if str(size) in sizes)
            return own(*values)

        return run

    monkeypatch.setattr(code, "compile_with_inductor", not_compiled)
    gtp_fx.optimize(deep(), schedule=COUNTS, example_inputs=images(1), shapes="shared")(images(1))
    assert len(asked) > 20 and all(given == real for given, real in asked)
    parts = "patches, attention at a site and elsewhere, what a site does, an MLP"
    assert compiles == 5 + 3, (
        f"{parts}, and decisions, the first and the last unlike the others: none for a count alone"
    )


def test_tuples_stay_within_a_section_also_where_a_site_begins() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 8, 4)
    for _ in range(2):
        parts = graph.call_function(torch.chunk, (x, 2, 1))
        kept = graph.call_function(torch.ops.gtp_fx.group.default, (x,))
        first, second = (graph.call_function(operator.getitem, (parts, i)) for i in range(2))
        parts.meta["val"] = tuple(torch.empty(2, 4, 4) for _ in range(2))
        for part in (first, second):
            part.meta["val"] = torch.empty(2, 4, 4)
        x = graph.call_function(torch.cat, ([first, second, kept], 1))
        kept.meta["val"] = x.meta["val"] = torch.empty(2, 8, 4)
    graph.output((x,))
    found = kinds(cut(graph))
    assert all(isinstance(value_of(node), Tensor) for kind in found for part in kind.sections for node in part.inputs)


class WritesInPlace(nn.Module):
    """Layers that double and halve their input in place while a view of it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            stream = layer(x)
            view = stream[:, :8]
            wide = torch.cat([stream, stream.sin(), stream.cos()], 1)
            stream.mul_(wide.mean(1, keepdim=True))
            x = torch.cat([view, wide], 1)[:, :8]
        return x


@pytest.mark.nightly
def test_by_default_sections_are_for_inference_on_a_cpu_where_sizes_differ(compiled: list[fx.GraphModule]) -> None:
    def in_sections(**options: Any) -> int:
        torch._dynamo.reset()
        compiled.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "compile_with_inductor", lambda gm, *_: gm)
            gtp_fx.optimize(model, example_inputs=images(), **options)(images())
        return len(compiled)

    model, counts = built(lambda: PlainViT(depth=3)), COUNTS[:3]
    assert in_sections(schedule=counts) == 0, "it may be trained"
    with torch.no_grad():
        assert in_sections(schedule=counts) > 0
        assert in_sections(schedule=counts, mode="max-autotune") == 0
        assert in_sections(flops_budget=1.0) == 0, "its blocks are alike, so Inductor's kernels are"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(alike.Kind, "convolves", True)
            assert in_sections(schedule=counts) == 0


@torch.no_grad()
@pytest.mark.parametrize("much", [0.0, 1e12])
def test_in_a_long_run_decisions_are_not_compiled(
    much: float, compiled: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alike, "_MUCH", much)
    x = images()
    fast = gtp_fx.optimize(deep(), schedule=COUNTS, example_inputs=x)
    reference = gtp_fx.optimize(deep(), schedule=COUNTS, example_inputs=x, compile=False)
    torch.testing.assert_close(fast(x), reference(x), rtol=0, atol=0)
    group = torch.ops.gtp_fx.group.default
    assert any(gm.graph.find_nodes(op="call_function", target=group) for gm in compiled) == (much > 1)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:backend 'gtp'")
def test_a_graph_that_writes_in_place_is_compiled_whole(
    compiled: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[fx.GraphModule] = []
    monkeypatch.setattr(backend, "compile_with_inductor", lambda gm, *_: whole.append(gm) or gm)
    model, x = built(WritesInPlace), torch.ones(2, 8)
    fast = torch.compile(model, backend=gtp, options={"flops_budget": 0.8, "shapes": "shared"})
    torch.testing.assert_close(fast(x), model(x))
    assert whole and not compiled


@torch.no_grad()
def test_what_torch_writes_to_a_file_is_compiled_whole(
    compiled: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for aot_compile: code that is shared is compiled as calls need it."""
    whole: list[fx.GraphModule] = []
    monkeypatch.setattr(backend, "compile_with_inductor", lambda gm, *_: whole.append(gm) or gm)
    with torch._functorch.config.patch(bundled_autograd_cache=True):
        torch.compile(deep(), backend=gtp, options={"schedule": COUNTS})(images())
    assert whole and not compiled


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
def test_static_shapes_are_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: InSections, gm: fx.GraphModule, inputs: Any) -> Any:
        raise AssertionError("compiled in sections")

    monkeypatch.setattr(InSections, "__call__", never)
    x = images()
    fast = gtp_fx.optimize(built(lambda: PlainViT(depth=2)), schedule=[2, 0], example_inputs=x, shapes="static")
    with torch.no_grad():
        assert isinstance(fast(x), Tensor)
    with pytest.raises(OptionError, match="shapes='open' is unknown; give one of 'auto', 'static', 'shared'"):
        gtp_fx.optimize(deep(), flops_budget=0.8, shapes="open")
