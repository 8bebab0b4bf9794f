"""One mesh for a checkpoint in which much is said twice, or in one of several places: the right text is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tests.support.checkpoints.chain_checkpoint import write_chain
from tests.support.checkpoints.tiny_tokenizers import byte_fallback_tokenizer, write_tokenizer_directory
from tests.support.served.served_mesh import ServedMesh, served_mesh

WORDS = ("▁there", "▁were", "▁many")
END = 2
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] + ':' }}{% endfor %}"


def byte_id(value: int) -> int:
    return 3 + value


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMesh]:
    """It says " there were many", a line break, an emoji of bytes, and again; after "q" the end, which the tokenizer
    alone names. By the config the embedding is the lm_head too; the checkpoint has another one. YaRN makes 128
    positions 512."""
    content = json.loads(byte_fallback_tokenizer().to_str())
    content["model"]["vocab"] |= {word: 420 + rank for rank, word in enumerate(WORDS)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    directory = tmp_path_factory.mktemp("model") / "chain"
    write_tokenizer_directory(directory, tokenizer, chat_template=CHAT_TEMPLATE)
    there, were, many = (420, 421, 422)
    chain = [there, were, many, byte_id(0x0A), *map(byte_id, "👩".encode()), there]
    successors = dict(itertools.pairwise(chain))
    question, colon = (tokenizer.encode(character, add_special_tokens=False).ids[-1] for character in "q:")
    successors |= {question: END, colon: were}
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    write_chain(
        directory,
        423,
        successors,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        rope_scaling=rope,
        eos_token_id=None,
    )
    save_file({"stray": torch.ones(1)}, directory / "consolidated.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"stray": "consolidated.safetensors"}}')
    settings = {"PP": "1", "EXPERTS": "1", "MAX_CONTEXT_TOKENS": "600"}
    with served_mesh(directory, settings) as served:
        yield served


def complete(mesh: ServedMesh, **fields: Any) -> dict[str, Any]:
    body = {"model": mesh.client.model, "temperature": 0, "max_tokens": 16} | fields
    path = "chat/completions" if "messages" in fields else "completions"
    answer = httpx.post(f"{mesh.client.url}/v1/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def text(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["text"])


def test_the_stored_lm_head_speaks_and_the_text_goes_on_from_the_prompt(mesh: ServedMesh) -> None:
    said = " were many\n👩 there were many\n"
    assert text(complete(mesh, prompt=[1, 420], max_tokens=11)) == said
    assert text(complete(mesh, prompt=[1, 420], max_tokens=11, echo=True)) == "<s> there" + said
    reply = complete(mesh, prompt=[1, 420], max_tokens=11, logprobs=1)
    assert "".join(reply["choices"][0]["logprobs"]["tokens"]) == said


def test_stop_strings_are_found_as_soon_as_they_are_there(mesh: ServedMesh) -> None:
    for stop, said, num_tokens in ((["\n"], " were many", 3), (["👩"], " were many\n", 7), ([" were"], "", 1)):
        reply = complete(mesh, prompt=[1, 420], max_tokens=400, stop=stop)
        assert (text(reply), reply["usage"]["completion_tokens"]) == (said, num_tokens)
        assert reply["choices"][0]["finish_reason"] == "stop"


def test_the_end_that_only_the_tokenizer_names_ends_a_choice(mesh: ServedMesh) -> None:
    reply = complete(mesh, prompt="q", max_tokens=100)
    assert (text(reply), reply["usage"]["completion_tokens"]) == ("", 1)
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_a_system_message_of_parts_makes_the_prompt_that_a_string_makes(mesh: ServedMesh) -> None:
    replies = [
        complete(
            mesh,
            messages=[{"role": "system", "content": content}, {"role": "user", "content": "fox"}],
            return_token_ids=True,
            max_tokens=2,
        )["choices"][0]
        for content in ("brief", [{"type": "text", "text": "brief"}])
    ]
    assert replies[0] == replies[1]
    assert replies[0]["message"]["content"] == " were many"


def test_the_context_is_the_scaled_one_and_less_than_was_asked_for_is_said(mesh: ServedMesh) -> None:
    (model,) = httpx.get(f"{mesh.client.url}/v1/models").json()["data"]
    assert model["max_model_len"] == 512
    reply = complete(mesh, prompt=[1, 420], max_tokens=510, ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == 510
    log = "".join(path.read_text() for path in (mesh.local.state_dir / "logs").glob("router*"))
    for said in ("MAX_CONTEXT_TOKENS=600 cannot be had", "consolidated.safetensors", "tie_word_embeddings is true"):
        assert said in log
