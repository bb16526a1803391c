"""Text: streaming never breaks a character, chat templates render in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.errors import ArtifactError, InputError, UnsupportedError
from qc.runtime import Artifact, load
from qc.runtime.text import TextModel, stream_pieces
from tests.runtime import toy

CHAT = (
    "{%- for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}<|assistant|>{% endgeneration %}{% endif %}"
    "{{ eos_token }}"
)


def byte_tokenizer() -> bytes:
    """Make a tokenizer of one token a byte, so that most characters are several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def spaced_tokenizer() -> bytes:
    """Make a tokenizer of words that drops the space in front of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {f"▁w{i}": i for i in range(toy.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer.to_str().encode()


BYTES = TextModel({"tokenizer.json": byte_tokenizer()})


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=5))
def test_pieces_join_to_the_text_and_are_whole(text: str, prompt: str) -> None:
    ids, before = BYTES.encode(text), BYTES.encode(prompt)
    pieces = list(stream_pieces(BYTES, ids, before))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece and piece for piece in pieces)


def test_half_a_character_at_the_end_is_marked() -> None:
    assert list(stream_pieces(BYTES, BYTES.encode("a€")[:-1])) == ["a", "\ufffd"]


def chat_files(template: str = CHAT) -> dict[str, bytes]:
    config = {"chat_template": template, "eos_token": {"content": "<end>"}, "bos_token": None}
    return {
        "tokenizer.json": byte_tokenizer(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def test_chat_templates_render() -> None:
    model = TextModel(chat_files())
    assert model.has_chat_template
    ids = model.encode_chat(" hello ")
    assert model.decode(ids) == "<|user|>hello\n<|assistant|><end>"
    own_file = TextModel(chat_files() | {"chat_template.jinja": b"{{ messages | length }}"})
    assert own_file.render_chat([{"role": "user", "content": "x"}] * 2) == "2"
    assert TextModel(chat_files("{{ strftime_now('%Y') }}")).render_chat([]).startswith("2")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% do messages.append(1) %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
    ],
)
def test_templates_cannot_do_harm(template: str) -> None:
    with pytest.raises(InputError, match="the chat template refuses"):
        TextModel(chat_files(template)).render_chat([{"role": "user", "content": "x"}])


def test_faults_of_text_files_are_clear(artifact: Artifact) -> None:
    with pytest.raises(UnsupportedError, match="has no tokenizer"):
        artifact.stream_text("x")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read"):
        TextModel({"tokenizer.json": b"{}"})
    with pytest.raises(InputError, match="no chat template"):
        BYTES.encode_chat("x")


def test_an_artifact_streams_text(tmp_path: Path) -> None:
    path = toy.write_artifact(
        tmp_path / "m", toy.language_manifest(tokenizer=True), tokenizer_dot_json=spaced_tokenizer()
    )
    artifact = load(path)
    expected = toy.expected_tokens([3, 1, 4], 12)
    assert artifact.tokenizer.encode("w3 w1 w4").ids == [3, 1, 4]
    pieces = list(artifact.stream_text("w3 w1 w4", 12))
    assert "".join(pieces) == "".join(f" w{token}" for token in expected[3:])
    assert len(pieces) == 12
