"""Reports: what is chosen of long runs, the words at the head, panels, and text that is not ours."""

import base64
import hashlib
import json
import os
import re
import tracemalloc

import pytest

from ppo.report import main
from reward.metrics import LARGER_IS_BETTER
from tests.helpers.run_folder import HOSTILE, STEP, judged, make_run
from utils.report import verdict
from utils.report.charts import draw_overview
from utils.report.choose import MAX_POINTS, choose_rows, evenly, short_names, thinned
from utils.report.page import page_of
from utils.report.panels import panels_of
from utils.report.read import MAX_SAMPLES, read_run


def test_a_long_line_keeps_its_ends_and_extremes():
    line = [(step, 0.0) for step in range(10_000)]
    line[1234], line[1240], line[7000] = (1234, 9.0), (1240, -3.0), (7000, 4.0)
    kept = thinned(line)
    assert len(kept) <= MAX_POINTS and kept == sorted(kept)
    assert {line[0], line[1234], line[1240], line[7000], line[-1]} <= set(kept)
    assert thinned(line[:500]) == line[:500]


def test_samples_are_whole_steps_spread_over_the_run():
    rows = [(step, held) for step in range(1, 1001) for held in (False,) * 4 + (True,) * 4 * (step % 100 == 0)]
    chosen = [rows[i] for i in choose_rows(rows, 100)]
    training, held_out = ([row[0] for row in chosen if row[1] == kind] for kind in (False, True))
    assert held_out == [step for step in range(100, 1001, 100) for _ in range(4)]
    assert len(training) == 60 and training[:4] == [1] * 4 and training[-4:] == [1000] * 4
    assert [training.count(step) for step in training] == [4] * 60
    assert choose_rows(rows[:7], 100) == list(range(7)) and choose_rows([(1, False)] * 9, 4) == [0, 1, 2, 3]
    assert evenly([1, 2, 3, 4, 5], 3) == [1, 3, 5]


def test_panels_are_those_with_numbers():
    row = {"step": 1, "score_mean": 1.0, "entropy": None, "value_loss": "x", "eval_kl_ref": 0.5, "perplexity_ref": 3,
           "seconds_rollout": 2.0, "seconds_<b>": 1.0, "memory_peak_gb": 4.0}  # fmt: skip
    found = {panel.title: list(panel.keys) for panel in panels_of([[row]])}
    assert found == {
        "Score": ["score_mean"],
        "KL to the reference, nats per response": ["kl_ref"],
        "Score against KL": ["kl_ref", "score_mean"],
        "Perplexity": ["perplexity_ref"],
        "Memory, GB": ["memory_peak_gb"],
        "Seconds per step": ["seconds_rollout"],
    }


def test_alarms_and_the_best_step_in_words(tmp_path):
    evaluation = {"eval_score_mean": 2.0, "eval_score_std": 1.0, "eval_kl_ref": 5.0, "eval_num_prompts": 25}
    metrics = [
        STEP,
        STEP | evaluation,
        STEP | evaluation | {"eval_score_mean": 3.0, "eval_kl_ref": 30.0},  # beyond best_max_kl
        STEP | evaluation | {"eval_score_mean": 4.0, "kl_ref": 50.0},  # with an alarm
        STEP | {"kl_ref": 61.5, "perplexity": 1.01, "rollbacks": 2},
    ]
    flags = {"train_steps": 9, "critic_pretrain_steps": 1, "best_max_kl": 20.0, "alarm_kl": 48.0}
    run = judged(make_run(tmp_path / "run", metrics, **flags))
    assert run.best["step"] == 2 and run.num_alarms == 2
    tiles = {label: (value, meaning) for label, value, meaning in verdict.tiles(run)}
    assert tiles["Steps"][0] == "5 of 10" and tiles["Best step"] == ("2", "without a best/")
    # 1.96 * 1 / sqrt(25) = 0.392
    assert tiles["Score"] == ("2", "held out, at the best step, 95 % interval 1.61 to 2.39")
    assert tiles["KL"] == ("5", "nats per response, held out, at the best step")
    assert tiles["Alarms"][0] == "2"
    assert tiles["Alarms"][1] == "steps with signs of a collapse, in the steps that are shown; rollbacks: 2"
    said = "\n".join(verdict.sentences(run))
    assert "Not finished: step 5 of 10, written on 20" in said
    assert "kl_ref was past --alarm_kl 48 at 2 steps between 4 and 5, up to 61.5: the policy is so far" in said
    assert "perplexity was past --alarm_perplexity 1.05 at step 5, down to 1.01: the policy repeats itself" in said
    assert "Rollbacks: 2." in said and "No alarm" not in said


def test_a_run_with_a_rollback_had_an_alarm(tmp_path):
    run = judged(make_run(tmp_path / "run", [STEP | {"rollbacks": 0}, STEP | {"rollbacks": 1}]))
    assert verdict.tiles(run)[-1] == ("Alarms", "none", "in the steps that are shown; rollbacks: 1")
    said = verdict.sentences(run)
    assert said[1].startswith("No alarm in the steps that are shown: ") and said[2].startswith("Rollbacks: 1.")


@pytest.mark.parametrize(
    ("steps", "has_final", "said"),
    [
        (2, False, "Not finished: step 2 of 5, "),
        (2, True, "Finished: the target was reached at step 2, "),
        (5, True, "Finished: all 5 steps are done, "),
    ],
)
def test_a_critic_that_is_trained_alone(tmp_path, steps, has_final, said):
    flags = {"pretrain": True, "critic_pretrain_steps": 5, "train_steps": 1000}
    folder = make_run(tmp_path / "run", [{"value_loss": 1.0, "kl_ref": 0.0}] * steps, **flags)
    if has_final:
        (folder / "final").mkdir()
    run = judged(folder)
    assert verdict.sentences(run)[0].startswith(said)
    assert verdict.tiles(run)[0] == ("Steps", f"{steps} of 5", "")


def test_a_finished_run_with_a_comparison_in_words(tmp_path):
    better, same = [2.0, 1.5, 2.5], [0.1, -0.2, 0.4]
    table = {"reward model score": {"before": [1.0, 0.5, 1.5], "after": [3.0, 2.5, 3.5], "difference": better},
             "reward_fn score": {"before": [0, 0, 0], "after": [0.1, 0, 1], "difference": same},
             "kl": {"after": [6.0, 5.5, 6.5]}}  # fmt: skip
    answers = [{"prompt": "p", "answer": "a", "answer_after": "b"}]
    comparison = {"policies": ["a/model", "b/final/"], "table": table, "answers": answers}
    folder = make_run(tmp_path / "run", [STEP] * 3, comparison=comparison, train_steps=3)
    (folder / "final").mkdir()
    (folder / "bad_batches").mkdir()
    (folder / "bad_batches" / "step_2_1.safetensors").write_text("")
    run = judged(folder)
    tiles = {label: (value, meaning) for label, value, meaning in verdict.tiles(run)}
    names = "before: model, after: final"
    meaning = f"reward model score, {names}, on 1 prompts; after: 95 % interval 2.5 to 3.5"
    assert tiles["Score"] == ("1 → 3", meaning)
    assert tiles["KL"] == ("6", "nats per response, 95 % interval 5.5 to 6.5") and tiles["Alarms"] == ("none", "")
    said = verdict.sentences(run)
    assert said[0] == "Finished: all 3 steps are done, and final/ holds the model after the last one."
    assert f"The reward model score is higher after the training ({names}): difference 2 [1.5, 2.5]" in said[1]
    assert "The reward_fn score is not clearly higher or lower after the training" in said[2]
    assert "difference 0.1 [−0.2, 0.4]" in said[2]
    assert said[3].startswith("No alarm") and said[4].startswith("1 bad batch was left out or")


def test_a_comparison_of_three_policies_by_a_judge(tmp_path):
    nan = [float("nan")] * 3
    tables = [{"reward_fn score": {"before": nan, "after": nan, "difference": nan}, "kl": {"after": nan}},
              {"kl": {"after": [7.0, 6.0, 8.0]}}]  # fmt: skip
    pairs = [{"policies": [0, 1], "prompts": 9, "win_rate": [0.75, 0.5, 1.0], "length_controlled_win_rate": None},
             {"policies": [1, 7], "prompts": 0}]  # fmt: skip
    comparison = {
        "policies": ["sft", "one/final", "two/final"], "table": tables[0], "tables": tables,
        "answers": [{"prompt": "p", "answer": "a", "answer_after": "b", "answer_3": "c"}],
        "ratings": {"judge": {"ratings": [[-120.0, -200.0, -40.0], [120.0, 40.0, 200.0], None]}},
        "judge": {"model": HOSTILE, "pairs": pairs},
    }  # fmt: skip
    run = judged(make_run(tmp_path / "run", [STEP | {"eval_kl_ref": 5.0, "eval_score_mean": 1.0}], [], comparison))
    tiles = {label: (value, meaning) for label, value, meaning in verdict.tiles(run)}
    assert tiles["Score"] == ("1", "held out, at the best step") and tiles["KL"][0] == "5"  # the comparison's are NaN
    assert len(verdict.sentences(run)) == 2
    page = page_of([run])
    assert "<p>before: sft, after: one/final</p>" in page and "<p>before: sft, after: two/final</p>" in page
    assert "<td>kl</td><td>7 [6, 8]</td>" in page and "<td>kl</td><td></td><td>unknown</td>" in page
    assert "<tr><td>sft</td><td>−120 [−200, −40]</td></tr>" in page
    assert "<tr><td>two/final</td><td>unknown</td></tr>" in page
    assert "<tr><td>one/final against sft</td><td>9</td><td>0.75 [0.5, 1]</td><td>unknown</td></tr>" in page
    assert "policy 8 against one/final" in page and '<p class="meta">after: one/final</p>' in page
    assert "By the judge &lt;script&gt;alert(1)&lt;/script&gt;&amp;\\u001b[2J" in page and page.count("<script") == 0


def test_the_shortest_names_that_tell_policies_apart():
    assert short_names(["a/model", "b/final/", "a/model"]) == ["model", "final", "model"]
    assert short_names(["runs/a/final", "runs/b/final"]) == ["a/final", "b/final"]
    assert short_names(["/", "org/model"]) == ["/", "model"] and short_names([]) == []
    assert short_names([f"{x}/1/2/3/4" for x in "ab"]) == ["a/1/2/3/4", "b/1/2/3/4"]


def test_a_comparison_of_an_earlier_model_is_left_out(tmp_path):
    comparison = {"table": {"kl": {"after": [6.0, 5.5, 6.5]}}, "answers": []}
    folder = make_run(tmp_path / "run", [STEP], comparison=comparison)
    last_step = (folder / "metrics.jsonl").stat().st_mtime_ns
    os.utime(folder / "comparison.json", ns=(last_step, last_step))
    assert judged(folder).comparison == comparison
    os.utime(folder / "comparison.json", ns=(last_step, last_step - 10**9))
    run = judged(folder)
    assert run.comparison is None and "KL" not in {tile[0] for tile in verdict.tiles(run)}
    remark = "comparison.json is left out, since it is older than the last step: run ppo.compare again, or touch it"
    assert any(text.startswith(remark) for text in verdict.sentences(run))


def test_the_best_step_of_supervised_runs(tmp_path):
    assert {name for name, larger in LARGER_IS_BETTER.items() if larger} == verdict.LARGER_IS_BETTER
    rows = [{"loss": 1.0, "eval_loss": loss, "accuracy": 0.5, "eval_accuracy": a}
            for loss, a in ((0.9, 0.6), (0.7, 0.8), (None, None), (0.6, 0.8))]  # fmt: skip
    assert judged(make_run(tmp_path / "reward", rows, validation_metric="accuracy")).best["step"] == 2
    run = judged(make_run(tmp_path / "sft", [{"loss": 1.0, "eval_loss": row["eval_loss"]} for row in rows]))
    assert run.best["step"] == 4 and run.num_alarms is None
    assert ("Loss", "0.6", "held out, at the best step; 0.9 at step 1") in verdict.tiles(run)


def test_hostile_text_is_shown_as_text(tmp_path):
    sample = {"prompt": HOSTILE, "answer": HOSTILE, "score": 1.0, "note": HOSTILE, HOSTILE: 3.0, "step": 1}
    held = {"step": 1, "held_out": True, "prompt": HOSTILE, "answer": "x" * 5000, "reference": HOSTILE}
    answers = [{"prompt": HOSTILE, "answer": HOSTILE, "answer_after": HOSTILE}]
    comparison = {"table": {HOSTILE: {HOSTILE: [1, 0, 2]}}, "answers": answers}
    flags = {"lr": HOSTILE, HOSTILE: [HOSTILE], "argv": [HOSTILE], "changed_flags": {"lr": HOSTILE, HOSTILE: 1}}
    metrics = [STEP | {HOSTILE: 1.0, f"seconds_{HOSTILE}": 1.0, "entropy": HOSTILE}] * 2
    name = HOSTILE.replace("/", "").replace("\u2028", "")
    first = make_run(tmp_path / f"a{name}", metrics, [sample, held], comparison, **flags)
    second = make_run(tmp_path / f"b{name}", metrics, [sample])
    pages = [page_of([judged(first)]), page_of([judged(first), judged(second)])]
    for page in pages:
        assert page.count("<script") == page.count("</script") == 1
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]", page)
        assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;\\u001b[2J\\u202eevil") >= 9
        assert "(3000 more characters)" in page


def test_a_sample_says_whether_it_ended_by_itself(tmp_path):
    samples = [{"step": 1, "prompt": "p", "answer": "a", "length": 3, "ended": ended} for ended in (True, False)]
    page = page_of([judged(make_run(tmp_path / "run", [STEP], samples))])
    shown = re.findall(r'<p class="meta">(.*?)</p>', page)
    assert shown == ["step 1 · length 3 · ended", "step 1 · length 3 · not ended"]


def test_only_the_script_of_the_page_may_run(tmp_path):
    page = page_of([judged(make_run(tmp_path / "run", [STEP], [{"prompt": "p", "answer": "a"}]))])
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert not re.search(r"(src|href)=[\"'](?!#)|url\((?!#)|@import| on\w+=", page.replace(script, ""))
    assert "<script" not in page_of([judged(make_run(tmp_path / "bare", [STEP]))])


def test_what_is_no_number_is_not_drawn_and_a_line_that_is_being_written_is_left_out(tmp_path):
    rows = [STEP, STEP | {"kl_ref": None, "score_mean": float("nan")}, STEP | {"score_mean": float("inf")}]
    folder = make_run(tmp_path / "run", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "score_mean": 7')
    run = judged(folder)
    page = page_of([run])
    assert run.last_step == 3 and 'aria-label="Score: training from 0.5 at step 1 to 0.5 at step 1"' in page
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", "".join(re.findall("<svg.*?</svg>", page, re.DOTALL)))


def test_several_runs_share_the_panels(tmp_path):
    sample = {"prompt": "same", "answer": "first answer", "score": 1.0}
    first = make_run(tmp_path / "one", [STEP] * 2, [sample])
    second = make_run(tmp_path / "two", [{"loss": 1.0}, {"loss": 0.5}], [sample | {"answer": "second answer"}])
    page = page_of([judged(first), judged(second)])
    for number, name in enumerate(("one", "two")):
        assert f'<span class="c{number}">━ {tmp_path / name}</span>' in page
    score, loss = (re.search(rf"<figure><figcaption>{title}</.*?</figure>", page, re.DOTALL)[0]
                   for title in ("Score", "Loss"))  # fmt: skip
    assert "var(--c0)" in score and "var(--c1)" not in score
    assert "var(--c1)" in loss and "var(--c0)" not in loss
    assert page.count("<article") == 1 and page.index("first answer") < page.index("second answer")


def test_a_long_run_is_cut_to_what_a_page_can_hold(tmp_path):
    samples = [{"step": i // 8 + 1, "prompt": f"p{i}", "answer": f"answer {i}."} for i in range(8000)]
    run = judged(make_run(tmp_path / "run", [STEP] * 1000, samples))
    assert len(run.samples) == MAX_SAMPLES and run.num_samples == 8000
    page = page_of([run])
    assert "400 of 8000 rows, from steps spread evenly over the run" in page
    assert "answer 0." in page and "answer 7999." in page


def test_samples_are_found_again_between_other_lines(tmp_path):
    """Lines that no run wrote, the text of other scripts, and one that is being written."""
    folder = make_run(tmp_path / "run", [STEP] * 3)
    rows = [json.dumps({"step": i, "prompt": "问" * i, "answer": f"é{i}"}, ensure_ascii=False) for i in (1, 2, 3)]
    (folder / "samples.jsonl").write_text(f'{rows[0]}\nforeign é\n\n{rows[1]}\n{{"step": 2}}\n{rows[2]}')
    run = judged(folder)
    assert [row["answer"] for row in run.samples] == ["é1", "é2"] and run.num_samples == 3


def test_the_samples_of_a_long_run_are_not_held_in_memory(tmp_path):
    row = {"prompt": "p", "answer": "x" * 10_000}
    folder = make_run(tmp_path / "run", [STEP], [row | {"step": i} for i in range(2000)])
    tracemalloc.start()
    try:
        assert len(read_run(folder, max_samples=4).samples) == 4
        assert tracemalloc.get_traced_memory()[1] < 4e6  # of 20 MB
    finally:
        tracemalloc.stop()


def test_the_overview_is_a_picture_of_a_card():
    for rows in ([STEP | {"step": 1, "eval_kl_ref": 2.0}], [{"step": 1, "loss": 0.5, "accuracy": None}], []):
        picture = draw_overview(rows)
        assert picture.startswith(b"\x89PNG") and len(picture) < 60_000
        assert [int.from_bytes(picture[i : i + 4]) for i in (16, 20)] == [1000, 400]


@pytest.mark.parametrize(("metrics", "said"), [(None, "not the folder of a run"), ([], "wait until the first step")])
def test_a_folder_without_steps_is_refused(tmp_path, capsys, metrics, said):
    if metrics is not None:
        make_run(tmp_path / "run", metrics)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()
