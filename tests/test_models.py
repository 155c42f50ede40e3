"""The proofs that every recipe must pass, with its own `case.py`. A copied recipe must pass them before its author
changes it.

L1  every published size has the parameters, keys and shapes of its release
L2  loss and gradients equal the oracle's; loading and writing keep a release; a release that does not fit is refused
L3  loss, gradients and two steps of every layout equal one process
L4  a run that is stopped and resumed equals the unbroken run, bit for bit
"""

import ast
import collections
import functools
import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layouts import whole_gradients
from ranks import run_ranks
from test_conformance import RECIPES, ROOT, parsed

from common import checkpoint, parallel, release, weights, worker
from common import train as loop

TOLERANCE = 1e-5  # relative to the largest entry of a tensor, or to a loss; fp32
READING_COST = 1300  # maximum lines of one forward
TRAJECTORY = 1e-6  # relative, of the losses of two steps


@functools.cache
def case(recipe: str):
    return importlib.import_module(f"zoo.{recipe}.case")


@functools.cache
def part(recipe: str, name: str):
    return importlib.import_module(f"zoo.{recipe}.{name}")


ARCHITECTURES = [(recipe, name) for recipe in RECIPES for name in case(recipe).CONFIGS]
PUBLISHED = [(recipe, size) for recipe in RECIPES for size in case(recipe).PUBLISHED]
LAYOUTS = [(r, name, which) for r in RECIPES for name, (_, _, these) in case(r).LAYOUTS.items() for which in these]
REFUSED = [(recipe, name) for recipe in RECIPES for name in case(recipe).REFUSED]


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Draws every parameter at random, also norms, biases and those that are initialised to zero."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        norm = len(shape) == 1 and name.endswith("weight")
        state[name] = 1 + 0.1 * noise if norm else 0.12 * noise
    return state


def source(state: dict[str, torch.Tensor]) -> release.Source:
    return release.Source(lambda name: state[name].element_size(), state.__getitem__)


def first_table(recipe: str, config) -> release.Table:
    return next(iter(case(recipe).tables(config).values()))


def filled(recipe: str, config, **values) -> tuple:
    """Returns (options, this rank's chunks with the shared random weights)."""
    o = case(recipe).options(config, **values)
    parallel.initialize(o)
    chunks = part(recipe, "model").build(o, config)
    state = random_state(first_table(recipe, config).shapes)
    with torch.no_grad():
        for name, parameter in checkpoint.parameters(chunks):
            shard = state[name]
            for dim, rank, size in checkpoint.cuts(parameter):
                shard = shard.chunk(size, dim)[rank]
            parameter.copy_(shard)
    return o, chunks


def differences(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Returns {name: relative difference} of the tensors whose difference exceeds the tolerance."""
    assert got.keys() == want.keys()
    errors = {name: ((got[name] - want[name]).abs().max() / want[name].abs().max()).item() for name in want}
    return {name: value for name, value in errors.items() if not value <= TOLERANCE}


# -------------------------------------------------------------------------------------------------- L1: published sizes


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Makes this process a group of one rank."""
    recipe = RECIPES[0]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        store = tmp_path_factory.mktemp("store") / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        parallel.initialize(case(recipe).options(next(iter(case(recipe).CONFIGS.values()))))
        yield
        parallel.shutdown()


@pytest.mark.L1
@pytest.mark.parametrize(("recipe", "size"), PUBLISHED)
def test_published_size_has_the_parameters_keys_and_shapes_of_its_release(recipe, size, one_process):
    config = part(recipe, "config").SIZES[size]
    o = case(recipe).options(next(iter(case(recipe).CONFIGS.values())))
    (model,) = part(recipe, "model").build(o, config, torch.device("meta"))
    shapes = {name: tuple(p.shape) for name, p in checkpoint.parameters([model])}
    count, tensors = case(recipe).PUBLISHED[size]
    assert sum(map(math.prod, shapes.values())) == count == config.parameters
    with torch.device("meta"):
        oracle = case(recipe).oracle(config)
    theirs = dict(oracle.named_parameters()) | dict(checkpoint.buffers([oracle]))
    assert sum(math.prod(p.shape) for p in theirs.values()) == count
    for name, table in case(recipe).tables(config).items():
        assert table.shapes == shapes, name
        released = {key: shape for key, shape in table.released_shapes().items() if key not in table.copies}
        assert len(released) == tensors and sum(map(math.prod, released.values())) == count, name


# --------------------------------------------------------------------------------------------------------- reading cost


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_forward_is_soon_read(recipe, capsys):
    lines = run_ranks(1, lines_of_one_forward, recipe)[0]
    with capsys.disabled():
        per_file = ", ".join(f"{file} {count}" for file, count in sorted(lines.items()))
        print(f"\none forward of {recipe} reaches {sum(lines.values())} lines: {per_file}", end="")
    assert sum(lines.values()) <= READING_COST


def lines_of_one_forward(recipe: str) -> dict[str, int]:
    """Counts lines by file: those of our functions that run when each architecture is built and computes a forward with
    its loss, those of their classes outside methods, and those of the config's class. Kernels and references count as
    far as a CPU calls them."""
    recipe_case, model_module, train, codes = case(recipe), part(recipe, "model"), part(recipe, "train"), set()
    parallel.initialize(recipe_case.options(next(iter(recipe_case.CONFIGS.values()))))
    for config in recipe_case.CONFIGS.values():
        o = recipe_case.options(config, micro_batch=2, global_batch=2)
        batch = recipe_case.prepare(
            o, [recipe_case.collate([recipe_case.sample(config, place, 0) for place in range(2)])]
        )
        sys.setprofile(lambda frame, event, _: codes.add(frame.f_code))
        (model,) = model_module.build(o, config)
        output, loss = train.forward_step(iter(batch), model)
        loss(output)
        sys.setprofile(None)
    lines = collections.defaultdict(set)
    for code in codes:
        path = Path(code.co_filename)
        if any(path.is_relative_to(ROOT / folder) for folder in ("zoo", "common", "kernels")):
            name = str(path.relative_to(ROOT))
            last = max(line for *_, line in code.co_lines() if line)
            lines[name] |= set(range(code.co_firstlineno, last + 1))
            lines[name] |= of_class(path, code.co_qualname.split(".")[0])
    name = type(config).__name__
    lines[f"zoo/{recipe}/config.py"] |= of_class(ROOT / "zoo" / recipe / "config.py", name)
    return {file: len(numbers) for file, numbers in lines.items()}


def of_class(path: Path, name: str) -> set[int]:
    """Returns the lines of a class outside its methods, or no lines if the name is a function's."""
    for node in parsed(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            return set(range(node.lineno, node.end_lineno + 1)).difference(
                *(range(m.lineno - len(m.decorator_list), m.end_lineno + 1) for m in methods)
            )
    return set()


# --------------------------------------------------------------------------------------------- L2: oracle and release


@pytest.mark.L2
@pytest.mark.parametrize(("recipe", "which"), ARCHITECTURES)
def test_loss_and_gradients_are_the_oracles(recipe, which):
    got, want = run_ranks(1, beside_oracle, recipe, which)[0]
    assert got["loss"] == pytest.approx(want["loss"], rel=TOLERANCE)
    assert not differences(got["gradients"], want["gradients"])


def beside_oracle(recipe: str, which: str) -> tuple[dict, dict]:
    recipe_case, config = case(recipe), case(recipe).CONFIGS[which]
    o, (model,) = filled(recipe, config, micro_batch=2, global_batch=2)
    samples = [recipe_case.sample(config, place, 0) for place in range(2)]
    batch = recipe_case.prepare(o, [recipe_case.collate(samples)])
    output, loss = part(recipe, "train").forward_step(iter(batch), model)
    value, _ = loss(output)
    value.backward()
    gradients = dict(recipe_case.to_oracle(name, p.grad) for name, p in model.named_parameters())
    oracle, state = recipe_case.oracle(config), random_state(first_table(recipe, config).shapes)
    oracle.load_state_dict(dict(recipe_case.to_oracle(name, tensor) for name, tensor in state.items()), strict=False)
    missing = dict(oracle.named_parameters()).keys() ^ gradients.keys()
    assert not missing, f"parameters that only one of the two models has: {sorted(missing)[:5]}"
    oracle_loss = recipe_case.oracle_loss(oracle, samples)
    oracle_loss.backward()
    theirs = {name: p.grad for name, p in oracle.named_parameters()}
    return {"loss": value.item(), "gradients": gradients}, {"loss": oracle_loss.item(), "gradients": theirs}


@pytest.mark.L2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("recipe", "which"), ARCHITECTURES)
def test_a_release_survives_loading_and_writing_bit_exactly(recipe, which, dtype, tmp_path):
    config = case(recipe).CONFIGS[which]
    for name, table in case(recipe).tables(config).items():
        state = {n: t.to(dtype) for n, t in random_state(table.shapes).items()}
        release.write(tmp_path / name, table, source(state))
        entries = table.entries(tmp_path / name)  # raises if a tensor is missing, unknown or misshaped
        assert {key: entry.shape for key, entry in entries.items()} == table.released_shapes()
        loaded = run_ranks(1, loaded_from, recipe, which, name, tmp_path / name, dtype)[0]
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[n], state[n]) for n in state)
        written = release.open_source(tmp_path / name, table)
        assert all(torch.equal(written.read(n), state[n]) for n in state)


def loaded_from(recipe: str, which: str, name: str, folder, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    config = case(recipe).CONFIGS[which]
    o = case(recipe).options(config, precision="fp32" if dtype == torch.float32 else "bf16")
    parallel.initialize(o)
    chunks, table = part(recipe, "model").build(o, config), case(recipe).tables(config)[name]
    release.load(chunks, table.entries(folder), table)
    return {n: p.detach() for n, p in checkpoint.parameters(chunks)}


@pytest.mark.L2
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_release_that_lacks_a_tensor_or_has_one_too_many_or_of_another_shape_is_refused(recipe, tmp_path):
    from safetensors.torch import load_file, save_file

    config = next(iter(case(recipe).CONFIGS.values()))
    table = first_table(recipe, config)
    release.write(tmp_path, table, source(random_state(table.shapes)))
    (file,) = tmp_path.glob("*.safetensors")
    whole = load_file(file)
    key = sorted(whole)[-1]
    for changed, message in (
        ({k: t for k, t in whole.items() if k != key}, f"1 missing: {key}"),
        (whole | {"stray": torch.ones(1)}, "1 not of this model: stray"),
        (whole | {key: torch.ones(3)}, f"1 misshaped: {key} is \\[3\\]"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            table.entries(tmp_path)


# --------------------------------------------------------------------------------------------------------- L3: layouts


def trained(recipe: str, which: str, values: dict, steps: int = 2) -> dict:
    """Trains from the shared weights. Rank 0 returns the whole gradients of the first step and all losses, others
    {}."""
    recipe_case, config = case(recipe), case(recipe).CONFIGS[which]
    o, chunks = filled(recipe, config, **values)
    wrapped = parallel.wrap(chunks, o, recipe_case.BLOCK)
    optimizer = loop.build_optimizer(o, wrapped)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    rank, out = parallel.mpu.get_data_parallel_rank(), {"losses": []}
    for step in range(steps):
        starts = [(micro * o.dp + rank) * o.micro_batch for micro in range(o.micro_batches)]
        samples = [[recipe_case.sample(config, start + i, step) for i in range(o.micro_batch)] for start in starts]
        batches = recipe_case.prepare(o, [recipe_case.collate(micro_batch) for micro_batch in samples])
        shape = {"micro_batch": o.micro_batch, "sequence_length": recipe_case.sequence_length(o, config)}
        loop.zero_gradients(wrapped, optimizer)
        results = loop.forward(wrapped, part(recipe, "train").forward_step, batches, **shape)
        if step == 0:
            out["gradients"] = whole_gradients(o, wrapped)
        loop.update(optimizer, 0.0, loop.reduce_gradients(optimizer))
        out["losses"].append(loop.global_loss(o, results, False)[0])
    return out if dist.get_rank() == 0 else {}


@functools.cache
def alone(recipe: str, which: str) -> dict:
    return run_ranks(1, trained, recipe, which, {})[0]


@pytest.mark.L3
@pytest.mark.parametrize(("recipe", "name", "which"), LAYOUTS)
def test_layout_equals_one_process(recipe, name, which):
    processes, values, _ = case(recipe).LAYOUTS[name]
    got, want = run_ranks(processes, trained, recipe, which, values)[0], alone(recipe, which)
    assert got["losses"][0] == pytest.approx(want["losses"][0], rel=TOLERANCE)
    assert not differences(got["gradients"], want["gradients"])
    assert got["losses"] == pytest.approx(want["losses"], rel=TRAJECTORY)


@pytest.mark.L3
@pytest.mark.parametrize(("recipe", "name"), REFUSED)
def test_layout_that_the_model_cannot_have_is_refused(recipe, name, monkeypatch):
    processes, values, message = case(recipe).REFUSED[name]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=f"{message}.*fix: "):
        case(recipe).options(next(iter(case(recipe).CONFIGS.values())), **values)


# ------------------------------------------------------------------------------------------------------------ L4: jobs


def run(recipe: str, argv: list[str]) -> None:
    options = part(recipe, "options")
    try:
        worker.run(f"zoo.{recipe}", "train", options.parse("train", argv))
    finally:
        torch.use_deterministic_algorithms(False)


def steps_of(folder) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "step"]


@pytest.mark.L4
@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_steps_of_the_embedded_default_stopped_and_gone_on_with_are_the_unbroken_ones(recipe, tmp_path):
    options = part(recipe, "options")
    options.prepare(options.parse("train", ["--out", str(tmp_path / "data")]))
    argv = [*case(recipe).QUICK, "--steps", "10", "--warmup", "2", "--save-every", "5", "--deterministic"]
    argv += ["--lr-schedule", "constant", "--out"]
    run_ranks(1, run, recipe, [*argv, str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")  # as if the run had died after step 5
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000010")
    rows = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "parts" / "metrics.jsonl").write_text("".join(rows[:6]))
    run_ranks(1, run, recipe, [*argv, str(tmp_path / "parts")])
    whole = steps_of(tmp_path / "whole")
    assert len(whole) == 10 and whole == steps_of(tmp_path / "parts")
    assert all(map(math.isfinite, (loss for _, loss, _ in whole)))
    saved = [weights.read_json(tmp_path / name / "checkpoints/step-000010/state.json") for name in ("whole", "parts")]
    assert saved[0]["model"] == saved[1]["model"]
