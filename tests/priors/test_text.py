"""Prompts for text-conditional priors, against the text encoders asked by hand; tiny random ones, no network."""

from __future__ import annotations

import functools
import gc
import json
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import invguide as ig
import tiny
from invguide.errors import CheckpointError, InputError, MissingPackageError
from invguide.images.reading import read_picture
from invguide.priors import embed_text
from invguide.priors.text import embed as text
from invguide.priors.text import encoders as text_encoders
from invguide.restoration.demo import PHOTO
from tiny import run

WORDS = ("a</w>", "ca", "cat</w>", "do", "dog</w>", "<|startoftext|>", "<|endoftext|>")
LETTERS = "acdgot"
VOCABULARY = {t: i for i, t in enumerate((*LETTERS, *(c + "</w>" for c in LETTERS[1:]), *WORDS))}
START, END = (VOCABULARY[f"<|{name}oftext|>"] for name in ("start", "end"))
LENGTH = 8  # of a prompt in tokens
PROMPTS = ["a cat", "dog a dog"]


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("diffusers")
    return pytest.importorskip("transformers")


def clip(transformers: Any, folder: Path, part: str, width: int, projected: bool = False) -> Any:
    """Save a CLIP text encoder of three layers and its tokenizer; return the encoder."""
    torch.manual_seed(width)
    config = transformers.CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=6,
        bos_token_id=START,
        eos_token_id=END,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    encoder = kind(config).eval()
    for weight in encoder.parameters():
        nn.init.normal_(weight, 0.0, 0.3)
    encoder.save_pretrained(folder / part)
    tokenizer = folder / part.replace("text_encoder", "tokenizer")
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(VOCABULARY))
    merges = ("#version: 0.2", "c a", "ca t</w>", "d o", "do g</w>")
    (tokenizer / "merges.txt").write_text("\n".join(merges) + "\n")
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(told))
    return encoder


def t5(transformers: Any, folder: Path, part: str, width: int) -> Any:
    torch.manual_seed(width)
    words = [(w, -1.0) for w in ("<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁dog")]
    tokenizer = transformers.T5Tokenizer(vocab=words, extra_ids=0)
    tokenizer.save_pretrained(folder / part.replace("text_encoder", "tokenizer"))
    config = transformers.T5Config(
        vocab_size=8,
        d_model=width,
        d_kv=4,
        d_ff=8,
        num_layers=2,
        num_heads=2,
        attn_implementation="eager",  # other orders of sums differ by 1e-5 in float32
    )
    encoder = transformers.T5EncoderModel(config).eval()
    encoder.save_pretrained(folder / part)
    return encoder


def index(folder: Path, pipeline: str, **encoders: Any) -> Path:
    """Write what diffusers writes of a pipeline."""
    content: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.33.0"}
    for part, encoder in encoders.items():
        name = type(encoder).__name__
        tokenizer = "CLIPTokenizer" if name.startswith("CLIP") else "T5TokenizerFast"
        content[part] = ["transformers", name]
        content[part.replace("text_encoder", "tokenizer")] = ["transformers", tokenizer]
    (folder / "model_index.json").write_text(json.dumps(content))
    return folder


def stable_diffusion(transformers: Any, folder: Path, width: int = 16) -> tuple[Path, Any]:
    encoder = clip(transformers, folder, "text_encoder", width)
    return index(folder, "StableDiffusionPipeline", text_encoder=encoder), encoder


def ids(*words: str) -> list[int]:
    """Tokens of CLIP by hand: start, words, end, and ends to fill up."""
    tokens = [START, *(VOCABULARY[f"{w}</w>"] for w in words)]
    return tokens + [END] * (LENGTH - len(tokens))


TOKENS = torch.tensor([ids("a", "cat"), ids("dog", "a", "dog")])
# "</s>" ends a text and "<pad>" fills it up.
T5_TOKENS = {"a cat": [3, 4, 1], "dog a dog": [5, 3, 5, 1]}


def t5_rows(encoder: Any, length: int, masked: bool = False) -> tuple[Tensor, Tensor]:
    rows = [T5_TOKENS[p] + [0] * (length - len(T5_TOKENS[p])) for p in PROMPTS]
    tokens = torch.tensor(rows)
    mask = (tokens != 0).long()
    with torch.no_grad():
        told = {"attention_mask": mask} if masked else {}
        return encoder(tokens, **told).last_hidden_state, mask.float()


def check(got: dict[str, Tensor], **expected: Tensor) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        assert not got[name].requires_grad
        assert got[name].std() > 0.01
        assert (got[name][0] != got[name][1]).any()
        # The same operations on the same weights; only sums may be in another order.
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-6)


# ---- every family, against its encoders asked by hand


def test_stable_diffusion(transformers: Any, tmp_path: Path):
    folder, encoder = stable_diffusion(transformers, tmp_path)
    with torch.no_grad():
        expected = encoder(TOKENS).last_hidden_state
    check(embed_text(folder, PROMPTS), text=expected)
    one = embed_text(str(folder), "a cat")["text"]
    torch.testing.assert_close(one, expected[:1], atol=1e-6, rtol=1e-6)
    # Old files: every name begins with text_model, and a table of positions lies among the weights.
    file = folder / "text_encoder" / "model.safetensors"
    weights = {n.removeprefix("text_model."): value for n, value in load_file(file).items()}
    weights = {f"text_model.{name}": value for name, value in weights.items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(weights, file)
    check(embed_text(folder, PROMPTS), text=expected)
    # A pickle is read as tensors.
    torch.save(weights, file.with_name("pytorch_model.bin"))
    file.unlink()
    check(embed_text(folder, PROMPTS), text=expected)


def two_clips(transformers: Any, folder: Path, first_projected: bool) -> tuple[Any, Any]:
    first = clip(transformers, folder, "text_encoder", 8, first_projected)
    return first, clip(transformers, folder, "text_encoder_2", 12, True)


def asked(encoder: Any) -> tuple[Tensor, Tensor]:
    """The states before the last layer, and that of the end of the text, projected by those that do."""
    with torch.no_grad():
        output = encoder(TOKENS, output_hidden_states=True)
    pooled = "text_embeds" if hasattr(output, "text_embeds") else "pooler_output"
    return output.hidden_states[-2], getattr(output, pooled)


def test_stable_diffusion_xl(transformers: Any, tmp_path: Path):
    first, second = two_clips(transformers, tmp_path, False)
    index(tmp_path, "StableDiffusionXLPipeline", text_encoder=first, text_encoder_2=second)
    (a, _), (b, pooled) = asked(first), asked(second)
    check(embed_text(tmp_path, PROMPTS), text=torch.cat([a, b], dim=2), pooled=pooled)


@pytest.mark.parametrize("mistake", ["another layer", "another order", "twice"])
def test_a_mistake_would_be_seen(
    mistake: str, transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    diffusers: Any = pytest.importorskip("diffusers")
    right = diffusers.StableDiffusionXLPipeline.encode_prompt
    changes = {"another layer": {"clip_skip": 1}, "twice": {"num_images_per_prompt": 2}}

    @functools.wraps(right)
    def encode_prompt(self: Any, prompt: list[str], **told: Any) -> Any:
        prompt = prompt[::-1] if mistake == "another order" else prompt
        return right(self, prompt, **told | changes.get(mistake, {}))

    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "encode_prompt", encode_prompt)
    with pytest.raises(AssertionError):
        test_stable_diffusion_xl(transformers, tmp_path)


def test_stable_diffusion_3(transformers: Any, tmp_path: Path):
    first, second = two_clips(transformers, tmp_path, True)
    third = t5(transformers, tmp_path, "text_encoder_3", 24)
    encoders = {"text_encoder": first, "text_encoder_2": second, "text_encoder_3": third}
    index(tmp_path, "StableDiffusion3Pipeline", **encoders)
    (a, pooled_a), (b, pooled_b) = asked(first), asked(second)
    states = nn.functional.pad(torch.cat([a, b], dim=2), (0, 24 - 8 - 12))
    expected = torch.cat([states, t5_rows(third, 256)[0]], dim=1)
    pooled = torch.cat([pooled_a, pooled_b], dim=1)
    check(embed_text(tmp_path, PROMPTS), text=expected, pooled=pooled)


def test_flux(transformers: Any, tmp_path: Path):
    first = clip(transformers, tmp_path, "text_encoder", 8)
    second = t5(transformers, tmp_path, "text_encoder_2", 24)
    index(tmp_path, "FluxPipeline", text_encoder=first, text_encoder_2=second)
    with torch.no_grad():
        pooled = first(TOKENS).pooler_output
    check(embed_text(tmp_path, PROMPTS), text=t5_rows(second, 512)[0], pooled=pooled)


@pytest.mark.parametrize(("name", "length"), [("Alpha", 120), ("Sigma", 300)])
def test_pixart(name: str, length: int, transformers: Any, tmp_path: Path):
    encoder = t5(transformers, tmp_path, "text_encoder", 24)
    index(tmp_path, f"PixArt{name}Pipeline", text_encoder=encoder)
    expected, mask = t5_rows(encoder, length, masked=True)
    check(embed_text(tmp_path, PROMPTS), text=expected, text_mask=mask)


# ---- what it costs, and what it refuses


def test_the_encoders_are_gone_afterwards(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = stable_diffusion(transformers, tmp_path)
    seen = []

    def load_parts(*arguments: Any) -> dict[str, Any]:
        parts = text_encoders.load_parts(*arguments)
        seen.append(weakref.ref(parts["text_encoder"]))
        return parts

    monkeypatch.setattr(text, "load_parts", load_parts)
    embed_text(folder, "a cat")
    gc.collect()
    assert [reference() for reference in seen] == [None]


def test_the_hub_gives_only_what_is_needed(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    folder, _ = stable_diffusion(transformers, tmp_path)
    asked: list[str] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "someone/pictures"
        asked.extend(p for p in allow_patterns if p != "*.json")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    got = embed_text("someone/pictures", "a cat")["text"]
    assert sorted(asked) == ["text_encoder/model.safetensors", "tokenizer/*"]
    assert torch.equal(got, embed_text(folder, "a cat")["text"])


class Harmful:
    """What a hostile pickle does when it is loaded as such."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_a_hostile_pickle_is_not_run(transformers: Any, tmp_path: Path):
    folder, _ = stable_diffusion(transformers, tmp_path)
    (folder / "text_encoder" / "model.safetensors").unlink()
    mark, file = tmp_path / "ran", folder / "text_encoder" / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"weight": Harmful(mark)}))
    pickle.loads(file.read_bytes())  # noqa: S301  it would run
    assert mark.exists()
    mark.unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        embed_text(folder, "a cat")
    assert not mark.exists()


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_kernel_named_by_a_file_is_not_fetched(transformers: Any, tmp_path: Path):
    folder, _ = stable_diffusion(transformers, tmp_path)
    expected = embed_text(folder, "a cat")["text"]
    names = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    remote = {"AutoModel": "someone/code--modeling.Model"}
    for name in names:
        edited(
            folder / "text_encoder" / "config.json", **{name: "someone/kernel"}, auto_map=remote
        )
        assert torch.equal(embed_text(folder, "a cat")["text"], expected)


@pytest.mark.parametrize("damage", ["missing", "left over", "shape", "larger", "nan", "truncated"])
def test_weights_that_do_not_fit(damage: str, transformers: Any, tmp_path: Path):
    folder, _ = stable_diffusion(transformers, tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("final_layer_norm.weight"))
    filler = {"other": torch.zeros(99)}
    match = r"does not fit CLIPTextModel .*no weight is ever left at random"
    if damage == "missing":
        del weights[name]
        weights |= filler
    elif damage == "left over":
        weights |= filler
    elif damage == "shape":
        weights[name] = torch.zeros(17)
    elif damage == "larger":
        edited(folder / "text_encoder" / "config.json", vocab_size=10**9)
        match = "CLIPTextModel has 16000"
    elif damage == "nan":
        weights[name] = weights[name] * torch.nan
        match = "return NaN or infinity"
    save_file(weights, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        match = "cannot be read as weights"
    with pytest.raises(CheckpointError, match=match):
        embed_text(folder, "a cat")


def test_a_tokenizer_without_its_files(transformers: Any, tmp_path: Path):
    folder, _ = stable_diffusion(transformers, tmp_path)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        embed_text(folder, "a cat")


def test_a_table_of_sentencepiece_names_what_reads_it(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index(
        tmp_path,
        "PixArtAlphaPipeline",
        text_encoder=t5(transformers, tmp_path, "text_encoder", 24),
    )
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer" / "spiece.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        MissingPackageError, match=r"spiece\.model needs .*pip install sentencepiece pr"
    ):
        embed_text(tmp_path, "a cat")


def test_models_without_text(transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"no model_index\.json; expected the folder or hub id"):
        embed_text(tmp_path, "a cat")
    with pytest.raises(InputError, match="natural has no model_index"):
        embed_text("natural", "a cat")
    index(tmp_path, "DiTPipeline")
    with pytest.raises(InputError, match="holds a DiTPipeline, which takes no text"):
        embed_text(tmp_path, "a cat")
    index(tmp_path, "StableDiffusionPipeline")
    with pytest.raises(CheckpointError, match="no text_encoder that can embed a prompt"):
        embed_text(tmp_path, "a cat")
    (tmp_path / "other").mkdir()
    folder, _ = stable_diffusion(transformers, tmp_path / "other")
    edited(folder / "model_index.json", tokenizer=["os", "system"])
    with pytest.raises(CheckpointError, match="no tokenizer that can embed a prompt"):
        embed_text(folder, "a cat")
    for wrong, expected in (([], "a text, or a list of texts"), (["a cat", 3], "a string, or a")):
        with pytest.raises(InputError, match=f"expected {expected}"):
            embed_text(folder, wrong)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'invguide\[diffusers\]'"):
        embed_text(folder, "a cat")


# ---- the command line


def told(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["restore"]


@pytest.mark.slow
def test_a_prompt_on_the_command_line(transformers: Any, tmp_path: Path):
    diffusers: Any = pytest.importorskip("diffusers")
    folder, _ = stable_diffusion(transformers, tmp_path)
    tiny.stable_diffusion(diffusers, folder)
    photo = tmp_path / "cat.png"
    Image.open(PHOTO).crop((40, 40, 160, 148)).resize((24, 16)).save(photo)
    common = (photo, "--task", "denoise", "--prior", folder, "--prior-set", "check=False")
    common += ("--steps", "2")
    arguments = ("restore", *common, "--sigma-y", "0.1")
    out = tmp_path / "out"
    assert "--prompt makes them of words" in run(*arguments, "--out", out, code=2)
    run(*arguments, "--prompt", "a cat", "--out", out)
    assert told(out)["prompt"] == "a cat"
    assert "done already" in run(*arguments, "--prompt", "a cat", "--out", out, "--resume")
    other = (*arguments, "--prompt", "a dog")
    refused = run(*other, "--out", out, "--resume", code=2)
    assert "prompt: a cat there, a dog here" in refused
    run(*other, "--out", tmp_path / "dog")
    pictures = [read_picture(o / "restored.png").values for o in (out, tmp_path / "dog")]
    assert not torch.equal(*pictures)
    # The same embeddings from a file.
    file = tmp_path / "text.npy"
    np.save(file, ig.priors.embed_text(folder, "a cat")["text"].numpy())
    run(*arguments, "--condition", f"text={file}", "--out", tmp_path / "file")
    same = read_picture(tmp_path / "file" / "restored.png").values
    assert torch.equal(same, pictures[0])

    both = (*other, "--condition", f"text={file}", "--out", out)
    assert "give one" in run(*both, code=2)
    assert "of the network" in run("plan", *common, "--prompt", "a cat")
    assert "give one" in run("doctor", folder, *both[-6:-2], code=2)
    words = ("--prompt", "a cat")
    assert "natural has no model_index.json" in run("doctor", "natural", *words, code=2)
    # Other weights of the encoder are another run.
    file = folder / "text_encoder" / "model.safetensors"
    save_file({n: w * 1.01 for n, w in load_file(file).items()}, file)
    changed = run(*arguments, "--prompt", "a cat", "--out", out, "--resume", code=2)
    assert "another weights file" in changed
