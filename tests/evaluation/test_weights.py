"""Weights are found where the user says, else on the hub, else in its cache; else the message says all that is needed."""

import os
import pickle
import threading
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch
from hub_server import handler
from safetensors.torch import save_file

from seppo_fast.errors import UserError
from seppo_fast.evaluation.scores.base import Score
from seppo_fast.evaluation.weights import MissingWeights, check_fit, locate, needed, read_tensors, source

REWARD = Score("reward", "Reward", {"model": "tiny/reward/weights/model.pt", "tokenizer": "tiny/words"},
               lambda parts, device: None)
WHOLE = Score("whole", "Whole", {"model": "tiny/whole"}, lambda parts, device: None)
WORDS = ["config.json", "merges.txt", "tokenizer_config.json", "vocab.json"]
PUBLISHED = (*WORDS, "README.md", "flax_model.msgpack", "model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin",
             "onnx/model.onnx", "onnx/config.json", "weights/model.pt")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """`published(name)` serves PUBLISHED as that repository in place of the hub, the cache empty, and gives what was fetched."""
    folder, servers = tmp_path / "published", []
    for name in PUBLISHED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)

    def serve(name: str) -> list[str]:
        kind = handler(folder, name)
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub, "ENDPOINT", endpoint)
        monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        return kind.fetched

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_given_paths_are_taken_by_score_and_by_part(tmp_path, offline):
    file, folder = tmp_path / "any name.pt", tmp_path / "words"
    file.write_text("")
    folder.mkdir()
    wanted = {"model": file, "tokenizer": folder}
    assert locate(REWARD, {"reward": str(file), "reward.tokenizer": str(folder), "other": "/nowhere"}) == wanted
    assert locate(REWARD, {"reward.model": str(file), "reward.tokenizer": str(folder)}) == wanted


def test_a_folder_that_holds_the_wanted_file_may_be_given(tmp_path, offline):
    file = tmp_path / "weights" / "model.pt"
    file.parent.mkdir()
    file.write_text("")
    assert locate(REWARD, {"reward": str(tmp_path), "reward.tokenizer": str(tmp_path)})["model"] == file


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_a_tokenizer_in_the_models_folder_is_taken_from_there(tmp_path, offline, name):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.pt").write_text("")
    for given in ({"reward": str(tmp_path)}, {"reward.model": str(tmp_path)}):
        with pytest.raises(MissingWeights, match="its tokenizer"):
            locate(REWARD, given)
    (tmp_path / name).write_text("{}")
    for given in ({"reward": str(tmp_path)}, {"reward.model": str(tmp_path)}):
        assert locate(REWARD, given) == {"model": tmp_path / "weights" / "model.pt", "tokenizer": tmp_path}
        assert source(REWARD, "tokenizer", given) == str(tmp_path)
    other = tmp_path / "weights"
    assert locate(REWARD, {"reward": str(tmp_path), "reward.tokenizer": str(other)})["tokenizer"] == other


@pytest.mark.parametrize("given", ["weights/model.pt", "weights"])
@pytest.mark.parametrize("place", ["weights", "weights/tokenizer"])
def test_a_tokenizer_that_lies_with_the_models_file_is_taken_from_there(tmp_path, offline, given, place):
    score = replace(REWARD, wants={"model": "tiny/reward/model.pt", "tokenizer": "tiny/words"})
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "weights" / "model.pt").write_text("")
    (tmp_path / place / "vocab.json").write_text("{}")
    assert locate(score, {"reward": str(tmp_path / given)}) == {
        "model": tmp_path / "weights" / "model.pt", "tokenizer": tmp_path / place}


@pytest.mark.parametrize(("given", "names"), [
    ({}, ["Reward (reward)", "its model", "weights/model.pt", "huggingface.co/tiny/reward", "--weights reward=PATH"]),
    ({"reward": "/no/such.pt"}, ["Reward", "/no/such.pt is no file", "huggingface.co/tiny/reward", "--weights reward=PATH"]),
    ({"reward": __file__},
     ["its tokenizer", "the folder of tiny/words", "huggingface.co/tiny/words", "--weights reward.tokenizer=PATH"]),
    ({"reward": __file__, "reward.tokenizer": __file__}, [f"{__file__} is no folder", "--weights reward.tokenizer=PATH"]),
])
def test_what_is_missing_is_named_with_its_place_and_flag(offline, given, names):
    with pytest.raises(MissingWeights) as raised:
        locate(REWARD, given)
    assert all(name in str(raised.value) for name in names), raised.value
    assert "\n" not in str(raised.value)


def test_a_model_comes_from_the_hub_as_safetensors_alone_and_stays_in_the_cache(published, monkeypatch):
    fetched = published("tiny/whole")
    folder = locate(WHOLE, {})["model"]
    assert sorted(set(fetched)) == sorted([*WORDS, "model.safetensors"]) == sorted(os.listdir(folder))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert locate(WHOLE, {})["model"] == folder


def test_one_file_and_a_tokenizer_come_without_the_other_weights(published, monkeypatch):
    fetched = published("tiny/reward")
    given = {"reward.tokenizer": str(Path(__file__).parent)}
    file = locate(REWARD, given)["model"]
    assert file.read_text() == "this is weights/model.pt" and set(fetched) == {"weights/model.pt"}
    fetched = published("tiny/words")
    folder = locate(REWARD, {"reward": str(file)})["tokenizer"]
    assert sorted(set(fetched)) == WORDS == sorted(os.listdir(folder))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert locate(REWARD, {}) == {"model": file, "tokenizer": folder}


def test_a_repository_that_is_not_there_is_missing_with_the_hubs_reason(published):
    published("tiny/another")
    with pytest.raises(MissingWeights, match=r"RepositoryNotFoundError: .*tiny/whole.*--weights whole=PATH"):
        locate(WHOLE, {})


def test_pickled_weights_are_fetched_where_nothing_else_is_published():
    assert needed(["config.json", "pytorch_model.bin", "a/model.safetensors"], "model") == ["config.json", "pytorch_model.bin"]


def test_tensors_are_read_from_both_kinds_of_file(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "t.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "t.pt")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole, inside, old = (read_tensors(tmp_path / name) for name in ("t.safetensors", "t.pt", "old.pth"))
    for found in (whole, inside["state_dict"], old):
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"weight": Code(ran)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Code(ran), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match=rf"{name} is damaged, or a pickle of more than tensors"):
            read_tensors(tmp_path / name)
    assert not ran.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert ran.exists()  # so there was something not to run


@pytest.mark.parametrize("kept", [0, 1, 10, 200, -1, -40])
@pytest.mark.parametrize("name", ["t.safetensors", "zip.pt", "old.pth"])
def test_a_cut_file_is_named(tmp_path, name, kept):
    tensors, file = {"a": torch.arange(300.0)}, tmp_path / name
    if name == "t.safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=name == "zip.pt")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"{name} .*[Ff]etch") as raised:
        read_tensors(file)
    assert "\n" not in str(raised.value)


def test_a_file_of_a_single_tensor_is_named(tmp_path):
    torch.save(torch.ones(3), tmp_path / "one.pt")
    with pytest.raises(UserError, match=r"one\.pt holds a Tensor"):
        read_tensors(tmp_path / "one.pt")


def test_names_and_shapes_that_do_not_fit_are_told_apart():
    expected = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)}
    check_fit(Path("x.pt"), expected, {name: tensor.half() for name, tensor in expected.items()}, "a head")
    with pytest.raises(UserError) as raised:
        check_fit(Path("x.pt"), expected, {"a": torch.ones(3, 1), "b": 5, "d": torch.ones(2)}, "a head")
    message = str(raised.value)
    assert message.startswith("x.pt does not hold the weights of a head (missing: c; unknown: d; of another shape: ")
    assert "a (3, 1) for (3,), b of type int for (2,)" in message
