"""A set of samples for each iteration, for every method that draws; and what a person sees of an improvement model's training."""

from types import SimpleNamespace

import pytest
from outcomes import column, identical, rows, steady_rows, weights
from PIL import Image

from seppo_fast.training.reporter import Reporter
from seppo_fast.training.rollouts import SampleSet


class InOrder:
    """A walk that takes the samples as they were drawn."""

    def row(self, place):
        return place


@pytest.mark.parametrize("changes", [{}, {"seppo.method": "spin"}, {"seppo.method": "ditto", "seppo.caption_dropout": 0.5}],
                         ids=str)
def test_used_once_and_in_order_they_train_the_same_model(changes, settings, train, tmp_path, monkeypatch):
    """16 samples for an iteration of 16 pairs: sample and slot have the same number, prompt and noise."""
    each = train(settings(**changes, **{"seppo.output_dir": str(tmp_path / "each"), "seppo.sampler.batch_size": 16,
                                        "seppo.sampler.window": "iteration"}))
    monkeypatch.setattr(SampleSet, "_walk", lambda self, k, usable: self.__dict__.update(_order_of=k, _order=InOrder()))
    together = train(settings(**changes, **{"seppo.output_dir": str(tmp_path / "set"), "seppo.sampler.batch_size": 16,
                                            "seppo.sampler.samples_per_iteration": 16}))
    assert identical(weights(each), weights(together))
    assert steady_rows(each) == steady_rows(together)


def test_a_set_is_drawn_once_an_iteration_and_shuffled(settings, train):
    run = train(settings(**{"seppo.sampler.samples_per_iteration": 8, "seppo.checkpoint.keep_last": 1}))
    assert [seconds > 0 for seconds in column(run, "seconds_sampling")] == [True, False, True, False]


def test_grids_of_an_improvement_model_show_loser_improved_winner(settings, train, pickapic):
    run = train(settings(**{"seppo.method": "improvement", "seppo.data.source": str(pickapic), "seppo.samples": {"every": 2},
                            "seppo.data.hold_out": 3, "seppo.evaluation": {"every": 2}}))
    grids = sorted((run / "samples").iterdir())
    assert [grid.name for grid in grids] == [f"update_{update:08}.png" for update in (0, 2, 4)]
    with Image.open(grids[-1]) as last, Image.open(grids[0]) as first:
        side = 128  # 16 pixels, enlarged
        assert last.width == 3 * side + 2 and last.height > 4 * side
        tiles = [[image.crop((x, 16, x + side, 16 + side)).tobytes() for x in (0, side + 1, 2 * side + 2)]
                 for image in (first, last)]
    assert tiles[0][0] == tiles[1][0] and tiles[0][2] == tiles[1][2], "the pair is not the same in both grids"
    assert tiles[0][1] != tiles[1][1] and len(set(tiles[1])) == 3
    gains = [row["heldout_winner_gain"] for row in rows(run) if "heldout_winner_gain" in row]
    assert len(gains) == 3 and gains[0] == 0 and gains[-1] != 0


def row(update, iteration, **losses):
    return {"update": update, "iteration": iteration, "reference": None, "loss": 0.5, "pairs_per_s": 1.0, "seconds": 1.0,
            "seconds_sampling": 0.0, **losses}


def test_a_model_that_ignores_its_image_is_told_at_the_iterations_end(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    reporter = Reporter(tmp_path, 6, 0, SimpleNamespace(enabled=False, tb_monitor=None, wandb_monitor=None), rank=0)
    reporter.update(row(1, 1, loss_reconstruct=0.4, loss_unconditional=0.3))
    reporter.update(row(2, 1, loss_improve=0.1))
    assert capsys.readouterr().out == ""
    reporter.update(row(3, 2, loss_reconstruct=0.2, loss_unconditional=0.3))
    told = capsys.readouterr().out
    assert "iteration 1: reconstructing a picture from itself has a loss of 0.4000, and from nothing 0.3000" in told
    reporter.update(row(4, 3, loss_unconditional=0.3))
    assert capsys.readouterr().out == "", "the second iteration heeds its image"
    reporter.update(row(5, 3, loss_reconstruct=0.3))
    reporter.close()
    assert "iteration 3: reconstructing" in capsys.readouterr().out
