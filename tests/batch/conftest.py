"""A batch of requests about documents, and the command that answers it with the shipped model."""

import json

import pytest


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A folder of four pictures."""
    from demo_documents import make_document

    folder = tmp_path_factory.mktemp("documents")
    for seed in range(4):
        make_document(seed).pil_image().save(folder / f"page {seed}.png")
    return folder


@pytest.fixture(scope="session")
def bodies(documents):
    """custom_id -> body: 60 of all kinds, some drawn at a temperature, five of them errors."""
    result = {}
    for i in range(55):
        picture = {"type": "image_url", "image_url": {"url": str(documents / f"page {i // 4 % 4}.png")}}
        text = {"type": "text", "text": ("Read everything.", f"Read line {i % 16 + 1}.", "List all values.")[i % 3]}
        body = {"model": "demo", "messages": [{"role": "user", "content": [picture, text]}], "max_tokens": 6 + i % 25}
        body |= ({}, {"temperature": 1.5}, {"kv_budget": 64}, {"temperature": 1.2, "seed": i}, {"stop": ["1"]})[i % 5]
        result[f"row {i}"] = body
    ask = {"role": "user", "content": "What?"}
    result["no picture"] = {"messages": [{"role": "user", "content": [{**picture, "image_url": {"url": "none.png"}}]}]}
    result["no option"] = {"messages": [ask], "temprature": 1}
    result["no setting"] = {"messages": [ask], "top_p": 7}
    result["no messages"] = {"model": "demo"}
    result["too long"] = {"messages": [{"role": "user", "content": "A " * 3000}]}
    return result


@pytest.fixture(scope="session")
def requests(bodies, tmp_path_factory):
    """The file of them."""
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})
        for name, body in bodies.items()
    ]
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.fixture(scope="session")
def model(demo):
    """Arguments."""
    return [
        *("-m", str(demo / "demo-text-q8_0.gguf"), "--mmproj", str(demo / "demo-mmproj-f16.gguf"), "--threads", "1"),
        *("--kv-budget", "96", "--parallel", "4"),
    ]


@pytest.fixture
def batch(model):
    """A function: runs the command in this process and returns its exit status."""
    from edge_shiftkv import cli

    return lambda *arguments: cli.main(["batch", *model, *map(str, arguments)])
