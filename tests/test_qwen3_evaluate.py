"""Evaluation: likelihoods and answers equal those of lm-eval-harness' own HFLM over transformers; tasks; refusals."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import qwen_case as case
import torch
from ranks import run_ranks
from test_qwen3 import infer_options, ours

from common.language import generate as generation
from common.language.options import task_names

pytestmark = [pytest.mark.L2, pytest.mark.usefixtures("one_rank")]

TOLERANCE = 1e-5
SPOKEN = {which: dataclasses.replace(c, vocab_size=2048) for which, c in case.CONFIGS.items()}  # the demo tokenizer's
TEXTS = ["The quick", "Return a list of the names that", "", "a " * 90, "x"]  # 90 words: more than 64 positions
ENDINGS = [" brown fox jumps", "y", " over the lazy dog and then some more of it", " end", "is"]


def options(**values):
    cls = case.jobs.EvaluateOptions
    chosen = {"size": "tiny", "precision": "fp32", "seed": 0, "batch": 3, "row_tokens": 40, "max_new_tokens": None}
    return cls(**{f.name: f.default for f in dataclasses.fields(cls)} | chosen | values)


# ------------------------------------------------------------------------------------------------- without the harness


@pytest.mark.parametrize("which", case.CONFIGS)
def test_scores_equal_transformers_whatever_shares_a_row(which, tmp_path):
    """With unequal lengths, endings of several tokens and of all but one, and several endings of one text."""
    config = case.CONFIGS[which]
    reference, model = case.save_oracle(tmp_path, config), ours(tmp_path)
    generator = torch.Generator().manual_seed(0)
    requests = []
    for length, sizes in ((9, (3,)), (1, (1, 1, 1)), (20, (20, 4)), (5, (1,)), (30, (2, 2))):
        tokens = torch.randint(96, (length,), generator=generator).tolist()
        likeliest = reference(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        endings = [torch.randint(96, (n,), generator=generator).tolist() for n in sizes]
        requests.append((tokens, [*endings, likeliest[-2:] if length > 1 else likeliest]))
    want = []
    for tokens, endings in requests:
        logs = reference(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        last = [(logs[-len(e) :], torch.tensor(e)) for e in endings]
        want.append([(part.gather(1, e[:, None]).sum().item(), bool((part.argmax(1) == e).all())) for part, e in last])
    for row_tokens in (1, 25, 1000):
        got = generation.score(model, requests, row_tokens)
        for mine, other in zip(got, want, strict=True):
            assert [likely for _, likely in mine] == [likely for _, likely in other]
            assert [value for value, _ in mine] == pytest.approx([value for value, _ in other], rel=TOLERANCE)
    assert [likely for row in got for _, likely in row].count(True) >= len(requests)


def test_logits_made_a_few_at_a_time_are_the_same(tmp_path, monkeypatch):
    case.save_oracle(tmp_path, case.CONFIGS["dense"])
    model, request = ours(tmp_path), [([5, 6, 7, 8, 9], [[1, 2, 3, 4]])]
    ((want, _),) = generation.score(model, request, 10)[0]
    monkeypatch.setattr(generation.ops, "CHUNK", 96 * 3)
    ((got, _),) = generation.score(model, request, 10)[0]
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [((9, 2, 3), [[1, 2], [0]]), ((5, 5, 5, 5), [[0, 1, 2], [3]]), ((1, 4, 8), [[0, 1], [2]]), ((), [])],
)
def test_prompts_share_a_batch_with_their_neighbours_in_length(lengths, wanted):
    assert list(generation.batch_prompts(list(lengths), infer_options(batch=3, max_new_tokens=12))) == wanted


def test_an_answer_ends_where_asked(tmp_path):
    case.save_oracle(tmp_path, case.CONFIGS["dense"])
    model, o = ours(tmp_path), infer_options(max_new_tokens=8, batch=2)
    prompts = [[1, 2, 3], [4, 5]]
    whole = generation.generate(model, prompts, o, set())
    wanted = whole[0][3]
    first = whole[0].index(wanted)
    cut = generation.generate(model, prompts, o, set(), stop=lambda answer: answer == whole[0][: first + 1])
    assert cut == [whole[0][: first + 1], whole[1]]


@pytest.mark.L0
def test_shipped_questions_are_what_the_script_makes_and_were_never_trained_on(tmp_path):
    make_data = importlib.import_module("common.language.demo.make_data")
    made = make_data.make_tasks(tmp_path / "tasks") / "sort_digits.jsonl"
    text = (case.jobs.DEMO_TASKS / "sort_digits.jsonl").read_text()
    assert made.read_text() == text
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 100 and all(len(set(r["choices"])) == 4 for r in rows)
    assert all(r["choices"][r["answer"]] == "".join(sorted(r["digits"])) for r in rows)
    trained = {answer for _, answer in make_data.questions("train", 8000, 0)}
    assert not trained & {r["choices"][r["answer"]] for r in rows}


WRONG = {
    "no sandbox": (["--tasks", "gsm8k,humaneval_instruct"], "--allow-code-execution"),
    "no folder": (["--task-folder", "nowhere"], "--task-folder"),
    "nothing": (["--tasks", ","], "--tasks"),
    "pipeline": (["--pp", "2"], "--pp 1"),
    "context": (["--cp", "2"], "--cp 1"),
}


@pytest.mark.L4
@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_said_before_anything_starts(name, monkeypatch):
    argv, named = WRONG[name]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(ValueError, match="fix: .*" + named):
        case.jobs.parse("evaluate", argv)


@pytest.mark.L4
def test_benchmarks_have_the_harness_names_and_the_demo_its_template(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("NPROC", "1")
    o = case.jobs.parse("evaluate", ["--tasks", "mmlu, C-Eval"])
    assert task_names(o) == ["mmlu", "ceval-valid"] and not o.chat
    assert case.jobs.parse("evaluate", []).chat and not case.jobs.parse("evaluate", ["--no-chat"]).chat


@pytest.mark.L4
def test_the_harness_is_not_installed_into_an_interpreter_of_the_users(monkeypatch):
    monkeypatch.setenv("ZOO_PYTHON", "python")
    monkeypatch.setattr(case.jobs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="requirements-evaluate.txt"):
        case.jobs.prepare(options())


# ---------------------------------------------------------------------------------------------------- with the harness


@pytest.fixture(scope="module")
def evaluate():
    pytest.importorskip("lm_eval", reason="pip install -r zoo/qwen3/requirements-evaluate.txt")
    return importlib.import_module("common.language.evaluate")


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(case.jobs.DEMO_TOKENIZER)


def harness_model(evaluate, folder: Path, out: Path, **values):
    o = options(**values)
    config, model = case.config.Qwen3Config.from_folder(folder), ours(folder).eval()
    answers, text_tokenizer = evaluate.Answers(out / "answers.jsonl", {"weights": str(folder)}), tokenizer()
    ends = case.infer.end_tokens(text_tokenizer)
    return evaluate.HarnessModel(
        o, config.positions, text_tokenizer, answers, lambda job: evaluate.answer(job, model, text_tokenizer, ends, o)
    )


def requests_of(kind: str, *arguments) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, i, ("task", i, 1)) for i, argument in enumerate(arguments)]


@pytest.fixture(scope="module", params=["dense", "moe"])
def both(request, evaluate, tmp_path_factory):
    """Returns (our model, the harness' own model) of the same weights."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("released")
    reference = case.save_oracle(folder, SPOKEN[request.param])
    reference.generation_config.eos_token_id = sorted(case.infer.end_tokens(tokenizer()))
    return harness_model(evaluate, folder, folder / "out"), HFLM(reference, tokenizer=tokenizer(), batch_size=3)


def test_likelihoods_equal_those_of_the_harness_own_model(both):
    """With contexts of unequal length, empty, and longer than the model; with endings of one token and of many."""
    pairs = [(text, ending) for text in TEXTS for ending in ENDINGS]
    got, want = (model.loglikelihood(requests_of("loglikelihood", *pairs), disable_tqdm=True) for model in both)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], rel=TOLERANCE)
    assert [likely for _, likely in got] == [likely for _, likely in want]


def test_rolling_likelihoods_equal_those_of_the_harness_own_model(both):
    texts = [(text,) for text in ("one", "The quick brown fox", "a b c d " * 40)]
    got, want = (m.loglikelihood_rolling(requests_of("loglikelihood_rolling", *texts)) for m in both)
    assert got == pytest.approx(want, rel=TOLERANCE)


def test_greedy_answers_equal_those_of_the_harness_own_model(both):
    """With stop strings, and with prompts that are cut from the left."""
    free = [(text or "y", {"until": [], "max_gen_toks": 12, "do_sample": False}) for text in TEXTS]
    mine, reference = (m.generate_until(requests_of("generate_until", *free), disable_tqdm=True) for m in both)
    assert mine == reference and any(len(text) > 12 for text in mine)
    stops = [[text[len(text) // 2 :][:2], text[-1:]] for text in mine]
    cut = [(text, settings | {"until": until}) for (text, settings), until in zip(free, stops, strict=True)]
    shorter, reference = (m.generate_until(requests_of("generate_until", *cut), disable_tqdm=True) for m in both)
    assert shorter == reference and shorter != mine


def test_an_interrupted_run_asks_only_what_is_not_answered(evaluate, tmp_path):
    case.save_oracle(tmp_path / "w", SPOKEN["dense"])
    pairs = requests_of("loglikelihood", *[(text, " end") for text in TEXTS])
    want = harness_model(evaluate, tmp_path / "w", tmp_path).loglikelihood(pairs, disable_tqdm=True)
    file = tmp_path / "answers.jsonl"
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([head, *lines[:3], lines[3][:20]]))  # killed within a line
    resumed = harness_model(evaluate, tmp_path / "w", tmp_path)
    requests, ask = [], resumed.ask
    resumed.ask = lambda job: requests.extend(job[1]) or ask(job)
    got = resumed.loglikelihood(pairs, disable_tqdm=True)
    assert [v for v, _ in got] == pytest.approx([v for v, _ in want], rel=TOLERANCE) and len(requests) == len(TEXTS) - 3
    resumed.answers.file.close()
    with pytest.raises(ValueError, match="answers of another run: weights"):
        evaluate.Answers(file, {"weights": "others"})


def test_settings_of_a_generation_that_would_be_ignored_are_refused(both):
    with pytest.raises(ValueError, match="num_beams"):
        both[0].settings({"until": "x", "num_beams": 4})
    settings = both[0].settings({"until": "x", "do_sample": True, "temperature": 0.7, "top_k": 5, "num_beams": 1})
    assert settings["until"] == ["x", "<|im_end|>"]
    assert settings["draw"] == {"max_new_tokens": 256, "temperature": 0.7, "top_p": 1.0, "top_k": 5}


def test_a_thought_is_no_part_of_an_answer_and_does_not_end_it(evaluate, tmp_path):
    case.save_oracle(tmp_path / "w", SPOKEN["dense"])
    lm, text_tokenizer = harness_model(evaluate, tmp_path / "w", tmp_path, thinking=True), tokenizer()
    assert lm.cut("so\n\nit is</think>\n\n42\nor not", ["\n"]) == "42"
    stop = evaluate.make_stop(text_tokenizer, ["\n"], thinking=True)
    answers = [text_tokenizer.encode(text) for text in ("so\n", "so\n</think>", "so\n</think>42", "so\n</think>42\n")]
    assert [stop(tokens) for tokens in answers] == [False, False, False, True]
    with pytest.raises(ValueError, match="--no-thinking"):
        lm.loglikelihood(requests_of("loglikelihood", ("a", "b")), disable_tqdm=True)


@pytest.fixture(scope="module")
def demo(evaluate, tmp_path_factory):
    """Runs the demo's weights on the demo's tasks. Returns (options, model, results)."""
    out = tmp_path_factory.mktemp("run")
    o = options(weights=case.jobs.DEMO_WEIGHTS, tokenizer=case.jobs.DEMO_TOKENIZER, chat=True, limit=20, batch=16,
                tasks="sort_digits,sort_digits_choice", task_folder=case.jobs.DEMO_TASKS, out=out)  # fmt: skip
    lm = harness_model(evaluate, o.weights, out, chat=True)
    return o, lm, evaluate.run(o, lm)


def test_demo_tasks_are_answered_far_above_chance(evaluate, demo, capsys):
    o, _, measured = demo
    evaluate.report(o, measured, {"weights": "w"})
    results = json.loads((o.out / "results.json").read_text())["results"]
    assert [(r["task"], r["metric"], r["chance"], r["n"]) for r in results] == [
        ("sort_digits", "exact_match", 0.02, 20), ("sort_digits_choice", "acc", 0.25, 20),
    ]  # fmt: skip
    assert all(r["value"] >= 0.9 and r["stderr"] is not None for r in results)
    table = capsys.readouterr().out
    assert "chance" in table and "0.0200" in table and "0.2500" in table
    assert len((o.out / "samples" / "sort_digits.jsonl").read_text().splitlines()) == 20


def test_a_group_has_the_number_and_the_chance_of_its_tasks(evaluate):
    measured = {
        "results": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "b": {"acc,none": 1.0, "acc_stderr,none": 0.0}},
        "groups": {"all": {"acc,none": 0.6, "acc_stderr,none": "N/A"}},
        "group_subtasks": {"all": ["some", "b"], "some": ["a"]},
        "n-samples": {"a": {"effective": 30}, "b": {"effective": 10}},
        "configs": {"a": {"metadata": {"chance": 0.2}}, "b": {"output_type": "multiple_choice"}},
        "samples": {"b": [{"arguments": [0, 1]}] * 10},
    }
    row = evaluate.list_results(measured)[-1]
    assert (row["task"], row["n"], row["stderr"]) == ("all", 40, None)
    assert row["chance"] == pytest.approx((0.2 * 30 + 0.5 * 10) / 40)


TASK = """
task: easy
dataset_path: somebody/questions
dataset_name: easy
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["A", "B"]
doc_to_target: a
unsafe_code: UNSAFE
"""
CARD = "---\nconfigs:\n- config_name: easy\n  data_files: [{split: test, path: easy/test.jsonl}]\n---\n"


@pytest.mark.parametrize("fault", ["", "script", "missing", "unsafe"])
def test_data_sets_are_read_from_the_task_folder_and_run_no_code(fault, evaluate, demo, tmp_path):
    """`hf download --repo-type dataset somebody/questions --local-dir somebody/questions` leaves such a folder."""
    o, lm, _ = demo
    repository = tmp_path / "somebody" / "questions"
    (repository / "easy").mkdir(parents=True)
    (repository / "README.md").write_text(CARD)
    (repository / "easy" / "test.jsonl").write_text('{"q": "one or two?", "a": 0}\n' * 3)
    (tmp_path / "easy.yaml").write_text(TASK.replace("UNSAFE", "true" if fault == "unsafe" else "false"))
    if fault == "missing":
        repository.rename(tmp_path / "elsewhere")
    if fault == "script":
        (repository / "questions.py").write_text("raise SystemExit('ran')")
    o = dataclasses.replace(o, tasks="easy", task_folder=tmp_path)
    if not fault:
        assert evaluate.list_results(evaluate.run(o, lm))[0]["n"] == 3
        return
    message = {"script": "scripts are no longer supported", "missing": "somebody/questions", "unsafe": "--allow-code"}
    with pytest.raises(ValueError, match=message[fault]) as caught:
        evaluate.run(o, lm)
    assert "fix: " in str(caught.value)


SCORED = [([5, 6, 7], [[1], [2]]), ([1] * 30, [[3, 4]]), ([2], [[9]]), ([8, 8], [[1, 1]])]
SAID = {"until": ["<|im_end|>"], "draw": {"max_new_tokens": 6}}, [[1, 2, 3], [4], [5, 6, 7, 8], [9, 9]]


def _answers_of_ranks(folder: str) -> list:
    """Returns this rank's answers, under two layouts, to jobs that only rank 0 knows."""
    from common import parallel

    evaluate, answers = importlib.import_module("common.language.evaluate"), []
    text_tokenizer = tokenizer()
    for tp in (1, 2):
        o = case.jobs.cli.check_layout(options(weights=Path(folder), tp=tp), heads=4, layers=4, tokens=None)
        parallel.initialize(o)
        model = case.infer.load_model(o, case.config.Qwen3Config.from_folder(Path(folder)))
        for job in ((None, SCORED), SAID):
            received = evaluate.broadcast(job if torch.distributed.get_rank() == 0 else None)
            answers.append(evaluate.answer(received, model, text_tokenizer, case.infer.end_tokens(text_tokenizer), o))
        parallel.mpu.destroy_model_parallel()
    return answers


@pytest.mark.L3
def test_data_and_tensor_parallel_answers_equal_one_process(evaluate, tmp_path):
    case.save_oracle(tmp_path, SPOKEN["dense"])
    lm = harness_model(evaluate, tmp_path, tmp_path / "out")
    scored, answers = (lm.ask(job) for job in ((None, SCORED), SAID))
    want = [value for row in scored for pair in row for value in pair]
    for dp_scores, dp_answers, tp_scores, tp_answers in run_ranks(2, _answers_of_ranks, str(tmp_path)):
        assert dp_answers == tp_answers == answers
        for scores in (dp_scores, tp_scores):
            assert [value for row in scores for pair in row for value in pair] == pytest.approx(want, rel=TOLERANCE)
