"""ppo.report: the page of a run has its table and its texts, escaped; what is no run is refused."""

import json

import pytest

from ppo.report import main


def make_run(folder, metrics: list[dict], answers: list[dict] | None = None):
    """A run's folder, as train_ppo.py and ppo.compare write it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"critic_pretrain_steps": 1, "lr": 5e-7}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    sample = {"step": 2, "prompt": "why & how?", "answer": "<script>alert(1)</script>", "score": 0.5}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    if answers:
        table = {"ended by itself": {name: [0.25, 0.125, 0.5] for name in ("before", "after", "difference")}}
        (folder / "comparison.json").write_text(json.dumps({"table": table, "answers": answers}))
    return folder


METRICS = [
    {"step": step, "score_mean": 0.1 * step, "kl_ref": None, "response_length": 9.0, "value_loss": 0.2,
     "eval_kl_ref": 1.0}
    for step in (1, 2)
]  # fmt: skip


def test_the_page_has_curves_table_and_escaped_samples(tmp_path):
    answers = [{"prompt": "hi", "answer": "<b>bold</b>", "answer_after": "<script>alert(2)</script>"}]
    finished = make_run(tmp_path / "finished", METRICS, answers)
    running = make_run(tmp_path / "running", METRICS)
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "score_')  # a line that is still being written
    main([str(finished), str(running), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<td>ended by itself</td><td>0.250 [0.125, 0.500]</td>" in page
    assert "<script" not in page and "<b>" not in page
    for text in ("&lt;script&gt;alert(1)", "&lt;script&gt;alert(2)", "why &amp; how?", "&quot;lr&quot;: 5e-07"):
        assert text in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("metrics", "said"), [(None, "not the folder of a run"), ([], "wait until the first step")])
def test_a_folder_without_steps_is_refused(tmp_path, capsys, metrics, said):
    if metrics is not None:
        make_run(tmp_path / "run", metrics)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()
