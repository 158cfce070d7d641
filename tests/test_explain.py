"""What a decision comes from: the numbers, the command, and the page in a browser."""

import dataclasses
import importlib.util
import json
import re
import shutil
from functools import partial

import pytest
import tolerances
import torch

from qwen3core import Embedder, InputError, Reranker, capture, edit, samples
from qwen3core.commands import main
from qwen3core.edits import replace_head
from qwen3core.explaining import contributions, explain, integrated_gradients, lens, page, tokens
from qwen3core.layout import Dense

QUERY, DOCUMENTS = samples.DEMO_QUERY, samples.DEMO_DOCUMENTS
HOSTILE = "</script><b> & \"quotes\" 'n'\n<!-- 北京 😀 é -->"
ONCE = 1e9
"""A tolerance that halves nothing."""
LONG = " ".join(DOCUMENTS * 4)
"""About 300 tokens."""


@pytest.fixture(scope="module")
def reranker():
    return Reranker.from_pretrained("tiny-reranker", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu")


@pytest.fixture(params=["reranker", "embedder"])
def opened(request):
    return request.getfixturevalue(request.param)


def decision(of, query, document):
    if isinstance(of, Reranker):
        return float(of.predict((query, document), logit=True))
    return of.similarity(of.encode_query(query), of.encode_document(document)).item()


@pytest.mark.parametrize(
    ("query", "document"),
    [("a", "b"), (QUERY, DOCUMENTS[4]), (QUERY, HOSTILE), ("Explain gravity", samples.DOCUMENTS[1])],
)
def test_attributions_are_complete(opened, query, document):
    found = integrated_gradients(opened, query, document)
    assert found.error < tolerances.COMPLETENESS
    assert abs(found.decision - decision(opened, query, document)) < tolerances.CONTRIBUTIONS
    total = sum(values.sum().item() for values in found.values)
    share = abs(total - (found.decision - found.baseline)) / abs(found.decision - found.baseline)
    assert share == pytest.approx(found.error, rel=1e-3, abs=1e-6)
    for values, text in zip(found.values, tokens(opened, query, document), strict=True):
        assert [value != 0 for value in values.tolist()] == [token.part != "template" for token in text]


@pytest.mark.slow
def test_attributions_of_long_texts_are_complete(opened):
    for document in [LONG, *DOCUMENTS, *samples.DOCUMENTS]:
        assert integrated_gradients(opened, QUERY, document).error < tolerances.COMPLETENESS, document


def test_attributions_equal_a_sum_of_many_small_steps(reranker):
    """The definition, written out: gradients at the middles of 100 equal steps, one copy at a time."""
    found = integrated_gradients(reranker, "a drum", "loud noise")
    [text] = tokens(reranker, "a drum", "loud noise")
    content = torch.tensor([[token.part != "template"] for token in text])
    with capture(reranker, "embed", detach=True) as acts:
        reranker.predict(("a drum", "loud noise"))
    baseline = torch.where(content, reranker.model.embed_tokens.weight.detach().mean(0), acts["embed"])
    total, steps = torch.zeros_like(baseline), 100
    for step in range(steps):
        x = (baseline + (step + 0.5) / steps * (acts["embed"] - baseline)).requires_grad_()
        with edit(reranker, {"embed": lambda _, x=x: x}):
            logit = reranker.predict(("a drum", "loud noise"), logit=True, grad=True)
        total += torch.autograd.grad(logit, x)[0] / steps
    expected = ((acts["embed"] - baseline) * total).sum(-1)
    assert (found.values[0] - expected).abs().max() < tolerances.COMPLETENESS * expected.abs().max()


def test_halving_the_path_makes_attributions_complete(reranker):
    once = integrated_gradients(reranker, QUERY, DOCUMENTS[4], tolerance=ONCE)
    halved = integrated_gradients(reranker, QUERY, DOCUMENTS[4])
    assert once.error > 10 * tolerances.COMPLETENESS
    assert halved.error < 0.5 * tolerances.COMPLETENESS
    assert (once.decision, once.baseline) == (halved.decision, halved.baseline)


def test_a_copy_at_a_time_gives_the_same(opened):
    together = integrated_gradients(opened, QUERY, "a violin", tolerance=ONCE)
    alone = integrated_gradients(opened, QUERY, "a violin", tolerance=ONCE, batch_tokens=1)
    for a, b in zip(together.values, alone.values, strict=True):
        assert (a - b).abs().max() < tolerances.SAME_TEXT_FP32 * 10


@pytest.mark.parametrize("document", [DOCUMENTS[2], HOSTILE, LONG])
def test_what_heads_and_mlps_add_sums_to_the_decision(opened, document):
    true = decision(opened, QUERY, document)
    added, by_layer = contributions(opened, QUERY, document), lens(opened, QUERY, document)
    config = opened.model.config
    assert added.shape == (1 + config.num_hidden_layers * (config.num_attention_heads + 1),)
    assert by_layer.shape == (config.num_hidden_layers + 1,)
    assert abs(added.sum().item() - true) < tolerances.CONTRIBUTIONS
    assert abs(by_layer[-1].item() - true) < tolerances.CONTRIBUTIONS
    assert (by_layer[:-1] - true).abs().min() > tolerances.CONTRIBUTIONS  # it is decided by the last layer
    assert not added.requires_grad


def test_each_row_is_of_the_part_that_it_says(opened):
    heads = opened.model.config.num_attention_heads
    for layer, head in ((0, 2), (2, 1), (3, 3)):
        row = 1 + layer * (heads + 1) + head
        assert contributions(opened, QUERY, "a violin")[row] != 0
        with edit(opened, replace_head(layer, head)):
            assert (contributions(opened, QUERY, "a violin") == 0).nonzero().tolist() == [[row]]
        with edit(opened, {f"layers.{layer}.mlp_out": lambda x: 0 * x}):
            assert (contributions(opened, QUERY, "a violin") == 0).nonzero().tolist() == [[row + heads - head]]


def test_lens_is_the_decision_of_fewer_layers(reranker):
    """After layer k it is what the model gives with the layers above it left out."""
    by_layer = lens(reranker, QUERY, DOCUMENTS[1])
    layers = reranker.model.layers
    try:
        for k in range(1, len(layers)):
            reranker.model.layers = layers[:k]
            assert abs(decision(reranker, QUERY, DOCUMENTS[1]) - by_layer[k].item()) < tolerances.CONTRIBUTIONS
    finally:
        reranker.model.layers = layers


def test_another_instruction_changes_every_number(opened):
    for function in (contributions, lens):
        usual, own = (function(opened, QUERY, "a drum", instruction=task) for task in (None, "Find a noise"))
        assert (usual - own).abs().max() > 1e-3
    own_words = integrated_gradients(opened, QUERY, "a drum", instruction="Find a noise", tolerance=ONCE)
    assert len(own_words.values[0]) == len(tokens(opened, QUERY, "a drum", "Find a noise")[0])


def test_tokens_say_their_text_and_part(opened):
    texts = tokens(opened, "Is it 北?", HOSTILE)
    ids = opened.to_sequences(["Is it 北?"])[0] if isinstance(opened, Embedder) else None
    assert ids is None or len(texts[0]) > len(ids)
    for part, text in (("query", "Is it 北?"), ("document", HOSTILE)):
        found = [token.text for all_ in texts for token in all_ if token.part == part]
        pieces = re.sub("(.)₁", r"\1", re.sub(".[₂₃₄]", "", "".join(found)))
        assert pieces.strip() == text
    whole = "".join(token.text for text in texts for token in text)
    for piece in ("北₁北₂北₃", "😀₁😀₂😀₃😀₄", "é₁é₂"):
        assert piece in whole
    end = "<|endoftext|>" if isinstance(opened, Embedder) else "</think>\n\n"
    assert whole.endswith(end)
    assert texts[-1][-1].part == "template"


def test_tokens_of_a_text_that_is_cut(reranker):
    cut = Reranker(reranker.model, reranker.tokenizer, max_length=100)
    with pytest.warns(UserWarning, match="truncated"):
        [text] = tokens(cut, QUERY, LONG)
    assert len(text) == 100
    assert [token.text for token in text[-6:]] == [token.text for token in tokens(reranker, "a", "b")[0][-6:]]
    with pytest.warns(UserWarning, match="truncated"):
        assert integrated_gradients(cut, QUERY, LONG).error < tolerances.COMPLETENESS


@pytest.mark.parametrize(
    "changed", [{"pooling": ("mean",)}, {"modules": (Dense("2_Dense", 256, 8),)}, {"labels": ("yes", "no")}]
)
def test_a_decision_without_one_direction_is_refused(opened, changed, monkeypatch):
    monkeypatch.setattr(opened.model, "layout", dataclasses.replace(opened.model.layout, **changed))
    for function in (contributions, lens):
        with pytest.raises(InputError, match="explain: expected a decision by the last token's hidden state"):
            function(opened, QUERY, "a drum")


def test_a_score_of_modules_and_several_scores_are_refused(reranker, monkeypatch):
    monkeypatch.setattr(reranker.model, "score_weight", lambda answers: None)
    with pytest.raises(InputError, match="explain: expected a score of one direction, found one of the"):
        contributions(reranker, QUERY, "a drum")
    layout = dataclasses.replace(reranker.model.layout, labels=("bad", "good"))
    monkeypatch.setattr(reranker.model, "layout", layout)
    with pytest.raises(InputError, match="explain: expected a checkpoint of one score, found bad, good"):
        integrated_gradients(reranker, QUERY, "a drum")


def test_bad_input_of_the_functions(reranker):
    quantised = Reranker.from_pretrained("tiny-reranker", dtype="int8", device="cpu")
    with pytest.raises(InputError, match="explain: expected weights with gradients, found int8"):
        integrated_gradients(quantised, QUERY, "a drum")
    with pytest.raises(InputError, match="tolerance: expected a finite number of at least 0, found -1"):
        integrated_gradients(reranker, QUERY, "a drum", tolerance=-1)
    with pytest.raises(InputError, match="documents: expected one or more, found none"):
        explain(reranker, QUERY, [], name="x")
    with pytest.raises(InputError, match=r"explain: expected texts of at most 1024 tokens .* found \d{4}"):
        explain(reranker, QUERY, [LONG * 4], name="x")


@pytest.fixture(scope="module")
def pages(reranker, embedder, tmp_path_factory):
    """Pages by name, of the shipped checkpoints: of a rough integral, which a browser does not see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "integrated_gradients", partial(integrated_gradients, tolerance=ONCE))
        made = {
            "reranker": explain(reranker, QUERY, [DOCUMENTS[4], HOSTILE, DOCUMENTS[2]], name="tiny-<reranker>"),
            "long": explain(reranker, QUERY, [LONG, LONG + HOSTILE], name="tiny-reranker"),
            "embedder": explain(embedder, QUERY, ["She tuned her old guitar.", "rain"], name="tiny-embedding"),
        }
    folder = tmp_path_factory.mktemp("pages")
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


def data_of(path):
    text = path.read_text("utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def test_a_page_is_small_and_says_what_it_holds(pages):
    long = data_of(pages / "long.html")
    assert (pages / "long.html").stat().st_size < 2_000_000
    assert min(len(text["tokens"]) for text in long["texts"]) > 300
    held = long["texts"][0]["patterns"]
    assert 8 <= len(held) <= 16
    assert all(text["patterns"].keys() == held.keys() for text in long["texts"])
    added = torch.tensor([document["contributions"][1:] for document in long["documents"]]).view(2, 4, 5)[..., :4]
    order = added.abs().sum(0).flatten().argsort(descending=True).tolist()
    assert list(held) == [f"{i // 4}.{i % 4}" for i in order[: len(held)]]
    assert len(data_of(pages / "reranker.html")["texts"][0]["patterns"]) == 16


def test_a_page_holds_the_functions_numbers(pages, embedder):
    data = data_of(pages / "embedder.html")
    document = data["documents"][0]
    assert document["text"] == "She tuned her old guitar."
    assert document["score"] == pytest.approx(decision(embedder, QUERY, document["text"]), abs=1e-6)
    for name, function in (("contributions", contributions), ("lens", lens)):
        expected = function(embedder, QUERY, document["text"])
        assert torch.allclose(torch.tensor(document[name]), expected, atol=1e-5)
    assert [[data["texts"][i]["name"] for i in each["texts"]] for each in data["documents"]] == [
        ["query", "document"]
    ] * 2
    assert [data["texts"][each["texts"][1]]["tokens"][0] for each in data["documents"]] == ["She", "rain"]
    assert "default-src 'none'" in (pages / "embedder.html").read_text("utf-8")  # a browser then loads nothing
    assert [len(values) for values in document["attribution"]] == [
        len(data["texts"][i]["tokens"]) for i in document["texts"]
    ]


def test_the_command_writes_a_page(tmp_path, capsys):
    out = tmp_path / "page.html"
    options = ["--query", "a", "--document", "b", "--instruction", "Find it"]
    assert main(["explain", "tiny-embedding", *options, "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert data_of(out)["documents"][0]["error"] < tolerances.COMPLETENESS
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("tiny-reranker", ["--max-length", "20"], "max_length: expected more than the"),
        ("tiny-reranker", ["--document", LONG * 4], "explain: expected texts of at most 1024 tokens"),
        ("absent", [], "absent: expected a checkpoint directory, one of"),
        ("tiny-embedding", ["--job", "reranker", "--document", "\udc80"], "expected Unicode text"),
    ],
)
def test_bad_input_of_the_command(model, options, message, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["explain", model, "--query", "a", "--document", "b", *options, "-o", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "a", "-o", "x.html"], "arguments are required: --document"),
        (["--query", "a", "--document", "b", "-o", "x.pdf"], "expected a name ending in .html, found 'x.pdf'"),
        (["--query", "a", "--document", "b", "-o", "no/x.html"], "expected a directory to write in, found none at no"),
    ],
)
def test_arguments_are_checked_before_any_work(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["explain", "not-even-opened", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync"]


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM or not importlib.util.find_spec("playwright"):
        pytest.skip("no chromium, or no playwright: pages are not opened")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield started
        started.close()


@pytest.fixture
def visit(browser, pages):
    """A function that opens a page; whatever it logs or asks the network for fails the test."""
    found: list[str] = []
    contexts = []

    def visit(name, *, scheme="light", width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        url = (pages / f"{name}.html").as_uri()
        opened = context.new_page()
        opened.on("console", lambda message: found.append(message.text))
        opened.on("pageerror", lambda error: found.append(str(error)))
        opened.on("request", lambda request: found.extend({request.url} - {url}))
        opened.goto(url)
        opened.wait_for_selector("#attention canvas")
        return opened

    yield visit
    for context in contexts:
        context.close()
    assert found == []


NAME = "(node => node.tagName !== 'SPAN' && node.id || node.getAttribute('role') || node.tagName)"
CONTROLS = "button, select, input, summary, a, canvas, [tabindex], [role=listbox], [role=grid], [role=option]"


def changes(opened, act, *selectors):
    """Whether an action changes what each of these selectors shows."""
    look = """selectors => selectors.map(selector => [...document.querySelectorAll(selector)].map(
        node => node.tagName === 'CANVAS' ? node.toDataURL() : node.outerHTML).join())"""
    before = opened.evaluate(look, selectors)
    act()
    opened.wait_for_timeout(150)
    after = opened.evaluate(look, selectors)
    return [a != b for a, b in zip(before, after, strict=True)]


def test_every_control_does_something(visit):
    opened = visit("reranker")
    assert set(opened.eval_on_selector_all(CONTROLS, f"nodes => nodes.map({NAME})")) == {
        "theme", "query", "left", "right", "BLOCKQUOTE", "listbox", "option", "SUMMARY", "region", "grid", "layer",
        "head", "text", "template", "img",
    }  # fmt: skip
    act = partial(changes, opened)
    canvas, strip, bars = "#attention canvas", "#attention .tokens", "#attention .bars"
    assert all(act(lambda: opened.select_option("#layer", "1"), canvas, strip, bars, "#parts td.chosen"))
    assert all(act(lambda: opened.select_option("#head", "3"), canvas, strip, bars, "#parts td.chosen"))
    assert all(act(lambda: opened.uncheck("#template"), canvas, strip))
    assert opened.locator("#attention .tokens").first.inner_text().strip() == f"{QUERY} {DOCUMENTS[4]}"
    assert "(and to the template with " in opened.locator("#attention h4").first.inner_text()
    assert all(act(lambda: opened.check("#template"), canvas, strip))
    assert all(act(lambda: opened.locator(canvas).first.click(position={"x": 200, "y": 200}), canvas, bars))
    assert any(act(lambda: opened.locator(canvas).first.hover(position={"x": 40, "y": 300}), "#attention .readout"))
    assert all(act(lambda: opened.locator("#attention [role=option]").nth(5).click(), canvas, bars))
    assert all(act(lambda: opened.locator("#attention [role=option]").nth(9).hover(), "#attention .readout"))
    assert all(act(lambda: opened.locator("#tokens [role=option]").nth(2).click(), "#tokens .readout", bars))
    assert "instrument" in opened.locator("#tokens .readout").first.inner_text()
    assert all(act(lambda: opened.locator("#parts td[data-part]").nth(2).click(), "#parts .readout", canvas))
    assert opened.locator("#parts .readout").first.inner_text().startswith("layer 0, head 2: ")
    assert (opened.input_value("#layer"), opened.input_value("#head")) == ("0", "2")
    assert all(act(lambda: opened.locator("#parts td[data-part]").nth(4).click(), "#parts .readout"))
    for summary in opened.locator("summary").all():
        summary.click()
    assert opened.locator("details[open] table").count() == opened.locator("summary").count() == 4
    assert all(
        act(lambda: opened.select_option("#left", "2"), *(f"#{id_}" for id_ in ("pair", "tokens", "lens", "parts")))
    )
    assert all(act(lambda: opened.select_option("#right", ""), "#pair", "#attention"))
    assert opened.locator("#pair > div").count() == opened.locator(canvas).count() == 1
    assert all(act(lambda: opened.select_option("#right", "1"), "#pair", "#attention"))
    assert all(act(lambda: opened.set_viewport_size({"width": 500, "height": 800}), "#lens", canvas))


def test_the_theme_follows_the_system_until_it_is_chosen(visit):
    opened = visit("embedder", scheme="dark")
    colour = "getComputedStyle(document.querySelector('section')).backgroundColor"
    dark = opened.evaluate(colour)
    opened.emulate_media(color_scheme="light")
    opened.wait_for_selector("html[data-theme=light]")
    light = opened.evaluate(colour)
    assert light == "rgb(255, 255, 255)" != dark
    names = []
    for _ in range(3):
        opened.click("#theme")
        names.append((opened.inner_text("#theme"), opened.evaluate(colour)))
    assert names == [("Theme: light", light), ("Theme: dark", dark), ("Theme: system", light)]


def test_everything_goes_by_keyboard(visit):
    opened = visit("embedder")
    act = partial(changes, opened)
    press = opened.keyboard.press
    opened.locator("#theme").focus()
    assert act(lambda: press("Enter"), "#theme") == [True]
    stops = []
    for _ in range(40):
        press("Tab")
        stops.append(opened.evaluate(f"{NAME}(document.activeElement)"))
    expected = ["query", "left", "right", *["BLOCKQUOTE"] * 2, *["listbox", "listbox", "SUMMARY"] * 2, *["SUMMARY"] * 2,
                "grid", "grid", "layer", "head", "text", "template", "listbox", "listbox"]  # fmt: skip
    assert stops[: len(expected)] == expected
    opened.locator("#tokens [role=listbox]").first.focus()
    readout = opened.locator("#tokens .readout").first
    for key, token in (
        ("ArrowRight", "a"),
        ("ArrowRight", "musical"),
        ("End", "strings"),
        ("ArrowLeft", "with"),
        ("Home", "a"),
    ):
        press(key)
        opened.wait_for_timeout(50)
        assert token in readout.inner_text(), key
    assert opened.input_value("#text") == "0"  # the query's attention is shown then
    opened.locator("#attention [role=listbox]").first.focus()
    assert all(act(lambda: press("ArrowRight"), "#attention canvas", "#attention .bars"))
    assert all(act(lambda: press("ArrowRight"), "#attention canvas", "#attention .bars"))  # and is still in focus
    opened.locator("#text").focus()
    assert all(act(lambda: press("ArrowDown"), "#attention canvas", "#attention .bars"))
    opened.locator("[role=grid]").first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft"):
        assert all(act(lambda key=key: press(key), "#parts .readout", "#parts td.chosen")), key
    opened.locator("#template").focus()
    assert act(lambda: press("Space"), "#attention canvas") == [True]


def test_text_of_any_kind_is_shown_as_it_is(visit):
    opened = visit("reranker")
    opened.select_option("#left", "1")
    assert opened.locator("#pair blockquote").first.text_content() == HOSTILE
    assert "tiny-<reranker>" in opened.inner_text("#model")
    assert opened.locator("b").count() == 0
    shown = opened.locator("#tokens [role=listbox]").nth(1).inner_text()
    assert "</script><b>" in shown.replace(" ", "")
    assert "↵<!--" in shown
    assert "😀₁😀₂😀₃😀₄" in shown


def test_the_map_shows_the_models_own_attention(visit, reranker):
    """The weights listed for a token are those of a capture, in their order."""
    opened = visit("reranker")
    opened.select_option("#layer", "2")
    opened.select_option("#head", "1")
    opened.locator("#attention [role=option]").nth(60).click()
    opened.wait_for_timeout(150)
    rows = opened.locator("#attention .bars").first.locator("tr").all_inner_texts()
    shown = {int(row.split()[0]): float(row.split()[-2]) for row in rows}
    with capture(reranker, "layers.2.pattern") as acts:
        reranker.predict((QUERY, DOCUMENTS[4]))
    weights = acts["layers.2.pattern"][1, 60] * 100
    assert all(abs(weights[i].item() - value) < 1.2 for i, value in shown.items())
    assert max(shown, key=lambda i: shown[i]) == weights.argmax().item()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "width"), [("reranker", 1280), ("embedder", 390)])
def test_accessibility(visit, name, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    opened = visit(name, scheme=scheme, width=width)
    for summary in opened.locator("summary").all():
        summary.click()
    assert opened.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    violations = axe.run(opened).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in violations if v["impact"] in ("serious", "critical")] == []


def test_a_long_text_is_drawn(visit):
    opened = visit("long")
    assert "of 16 heads" in opened.inner_text("#included") or opened.locator("#included").is_hidden()
    ink = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
    assert opened.locator("#attention canvas").first.evaluate(ink) > 50
