"""The report in a real browser: what a reader sees, clicks and types, whatever the completions hold."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import evaluation_line, sample_rows, step_line, write_lines, write_run

from es_engine.report import RunGroup, Table, find_runs, group_runs, read_run, watch, write_report

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on the PATH (scripts/chromium.sh installs it)")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

TIMEOUT_MS = 60_000

ATTACK = '</script><script>window.harmed = 1</script><img src="x" onerror="window.harmed = 1">'
COMPLETIONS = [ATTACK, "a\u202egnp.exe\x00\x1b[2J", "W" * 3000, "Z" + "\u0335\u0321" * 200, "\ud800 4 * 6", "4 * 6"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two seeds of ES, one of them of GRPO and a run of SFT, and two tables."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method, seed in (("es-seed0", "es", 0), ("es-seed1", "es", 1), ("grpo", "grpo", 0), ("sft", "sft", 0)):
        write_run(folder / name, method, seed=seed, problems=24, completions=COMPLETIONS)
    path = folder / "report.html"
    table = Table(f"Result {ATTACK}", ATTACK, ["Method", "p"], [[ATTACK, 0.0123]])
    groups = group_runs([read_run(run) for run in find_runs([folder])])
    details = Table("Details", "", ["Method", "tokens"], [["es", 12]])
    write_report(path, groups, title=ATTACK, tables=[table], details=[details], pngs=False)
    return path


class Reader:
    """Somebody who looks at a page, and notes what goes wrong with it."""

    def __init__(self, browser: Any, url: str, *, width: int = 1280, scheme: str = "light") -> None:
        self.faults: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, url))
        self.page.goto(url)
        self.wait()

    def _note(self, requested: str, url: str) -> None:
        if not requested.startswith((url, "data:", "blob:")):
            self.faults.append(f"asked for {requested}")

    def wait(self) -> None:
        """Until every plot is drawn."""
        self.page.wait_for_selector("body[data-drawn]", state="attached")

    def choose(self, control: str, value: str) -> None:
        self.page.select_option(f"#{control}", value)
        self.wait()

    def traces(self, plot: str = "held-out") -> list[dict[str, Any]]:
        """What a plot draws."""
        code = f"document.querySelector('#plot-{plot} .plot').data.map(({{x, y, name}}) => ({{x, y, name}}))"
        return self.page.evaluate(code)

    def line(self, name: str) -> list[float]:
        """Where the points of a curve lie on the budget axis."""
        (trace,) = (trace for trace in self.traces() if trace.get("name") == name)
        return trace["x"]

    def listed(self) -> list[str]:
        """The samples on the list, by problem."""
        return self.page.locator("#sample-list h3").all_text_contents()

    def count(self) -> str:
        return self.page.text_content("#sample-count")

    def close(self) -> None:
        self.page.close()
        assert self.faults == []


def test_a_budget_axis_seeds_and_methods_are_chosen(browser: Any, report: Path) -> None:
    reader = Reader(browser, report.as_uri())
    assert reader.line("grpo") == [0, 1092, 2184, 3276]  # processed tokens, since SFT generates none
    summary = reader.page.get_attribute("#plot-held-out .plot", "aria-label")
    reader.choose("axis", "steps")
    assert reader.line("grpo") == [0, 2, 4, 6]
    assert "over steps" in reader.page.get_attribute("#plot-held-out .plot", "aria-label") != summary
    names = [trace.get("name") for trace in reader.traces()]
    reader.page.check("#seeds")
    reader.wait()
    seeds = [trace["name"] for trace in reader.traces() if trace.get("name") not in names]
    assert seeds == ["es, seed 0", "es, seed 1"]
    reader.page.uncheck("#bands")
    reader.wait()
    assert len(reader.traces()) == len(names) + 2 - 6
    reader.page.get_by_role("checkbox", name="grpo").uncheck()
    reader.wait()
    assert "grpo" not in [trace.get("name") for trace in reader.traces()]
    reader.page.select_option("#plot-components select", "form, training")
    assert {y for trace in reader.traces("components") for y in trace["y"]} == {0.5}
    reader.page.click("#plot-held-out summary")
    reader.page.wait_for_selector("#plot-held-out table")
    assert reader.page.locator("#plot-held-out tbody tr").count() == 8
    with reader.page.expect_download() as download:
        reader.page.get_by_role("button", name="Save Held-out evaluation as PNG").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    reader.close()


def test_completions_are_filtered_searched_and_turned_over(browser: Any, report: Path) -> None:
    reader = Reader(browser, report.as_uri())
    everything = reader.listed()
    assert (len(everything), reader.count()) == (10, "1 to 10 of 24")
    reader.page.click("#sample-next")
    assert reader.count() == "11 to 20 of 24"
    assert not set(reader.listed()) & set(everything)
    reader.choose("sample-filter", "rose")
    changes = reader.page.locator("#sample-list .change").all_text_contents()
    assert changes
    assert all(change == "reward 0.1 → 1 ▲ rose" for change in changes)
    reader.choose("sample-filter", "worst")
    rewards = [change.split()[3] for change in reader.page.locator("#sample-list .change").all_text_contents()]
    assert rewards == sorted(rewards)
    reader.page.fill("#sample-search", "PROBLEM 17:")
    assert (reader.listed(), reader.count()) == (["heldout-17"], "1 to 1 of 1")
    reader.choose("sample-run", "grpo")
    assert reader.listed() == ["heldout-17"]
    reader.close()


def test_another_run_is_shown_as_near_to_the_last_as_it_can_be(browser: Any, tmp_path: Path) -> None:
    """The step next to the one that was chosen, and the population of a run that is shown."""
    runs = [read_run(write_run(tmp_path / f"every{every}", every=every)) for every in (2, 3)]
    groups = [RunGroup(run.name, (run,)) for run in runs]
    write_report(tmp_path / "report.html", groups, title="Two of ES", pngs=False)
    reader = Reader(browser, (tmp_path / "report.html").as_uri())
    reader.choose("sample-after", "2")
    reader.page.select_option("#sample-run", label="every3")
    assert [reader.page.input_value(f"#sample-{side}") for side in ("before", "after")] == ["0", "3"]
    reader.page.get_by_role("checkbox", name="every2").uncheck()
    reader.wait()
    assert reader.page.text_content("#plot-population .legend li") == "■every3"
    reader.close()


def test_results_stand_before_the_curves_and_details_after_them(browser: Any, report: Path) -> None:
    reader = Reader(browser, report.as_uri())
    headings = reader.page.locator("main h2").all_text_contents()
    assert headings == [
        "Summary",
        f"Result {ATTACK}",
        "Curves",
        "Details",
        "Held-out completions",
        "Failures",
        "Configs",
    ]
    assert reader.page.locator("#details tbody tr").all_text_contents() == ["es12"]
    reader.close()


def test_hostile_completions_are_text(browser: Any, report: Path) -> None:
    reader = Reader(browser, report.as_uri())
    texts = reader.page.locator("#sample-list .sides pre").all_text_contents()
    assert ATTACK in texts
    assert "aU+202Egnp.exeU+0000U+001B[2J" in texts
    assert any(text.startswith("U+D800") for text in texts)
    assert reader.page.text_content("h1") == ATTACK
    assert reader.page.evaluate("window.harmed") is None
    assert reader.page.locator("img, main script").count() == 0
    reader.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_both_schemes(browser: Any, report: Path, scheme: str) -> None:
    reader = Reader(browser, report.as_uri(), width=400, scheme=scheme)
    page = reader.page
    assert page.locator(".plot.js-plotly-plot").count() == page.locator(".card").count() == 9
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    colour, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (_brightness(colour) > _brightness(paper)) == (scheme == "dark")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    other = {"light": "dark", "dark": "light"}[scheme]
    reader.choose("theme", other)
    assert (_brightness(page.evaluate("getComputedStyle(document.body).color")) > 300) == (other == "dark")
    reader.close()


def test_a_live_page_follows_the_run_and_keeps_what_was_chosen(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SHARE_OF_TIME", float("inf"))
    run = write_run(tmp_path / "run", "es", steps=4)
    with watch.WatchServer([tmp_path]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reader = Reader(browser, server.url)
        page = reader.page
        reader.choose("axis", "steps")
        reader.choose("sample-filter", "best")
        page.add_style_tag(content=".scroll { max-height: 60px !important }")
        page.click("#plot-held-out summary")
        page.wait_for_selector("#plot-held-out .scroll")
        page.evaluate("document.querySelector('#plot-held-out .scroll').scrollTo(0, 30)")
        page.focus("#sample-search")
        page.evaluate("window.scrollTo(0, 700)")
        assert reader.line("run") == [0, 2, 4]

        drawn = random.Random(0)
        rows = sample_rows(6, 12, ["new"], drawn, 1.0)
        write_lines(run / "samples/step-000006.jsonl", rows)
        _append(run / "ledger.jsonl", *(step_line("es", step, drawn) for step in (4, 5)))
        _append(run / "eval.jsonl", evaluation_line(6, rows))

        page.wait_for_selector("#sample-list h4:has-text('After (step 6)')")
        reader.wait()
        assert reader.line("run") == [0, 2, 4, 6]
        assert page.input_value("#axis") == "steps"
        assert page.input_value("#sample-filter") == "best"
        assert page.evaluate("[document.activeElement.id, window.scrollY]") == ["sample-search", 700]
        assert page.locator("#plot-held-out tbody tr").count() == 4
        assert page.evaluate("document.querySelector('#plot-held-out .scroll').scrollTop") == 30

        page.evaluate("document.querySelector('#sample-list').firstElementChild.dataset.read = ''")
        write_run(tmp_path / "other", "grpo")
        page.wait_for_selector("#sample-run option:nth-child(2)", state="attached")
        assert page.locator("#sample-list [data-read]").count() == 1
        assert page.evaluate("[...document.querySelectorAll('#config-run option')].map(each => each.text)") == [
            "other",
            "run",
        ]
        assert page.text_content("#config").startswith("name: run\n")
        server.shutdown()
        reader.close()


def test_a_live_page_keeps_to_a_run_that_another_seed_joins_and_to_what_was_zoomed(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SHARE_OF_TIME", float("inf"))
    for name, method in (("es-seed0", "es"), ("grpo-seed0", "grpo")):
        write_run(tmp_path / name, method)
    zoom = "document.querySelector('#plot-held-out .plot').layout.xaxis"
    with watch.WatchServer([tmp_path]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reader = Reader(browser, server.url)
        page = reader.page
        page.select_option("#sample-run", label="grpo-seed0")
        page.select_option("#config-run", label="grpo-seed0")
        page.get_by_role("checkbox", name="grpo-seed0").uncheck()
        reader.wait()
        page.evaluate("Plotly.relayout(document.querySelector('#plot-held-out .plot'), {'xaxis.range': [400, 900]})")

        write_run(tmp_path / "grpo-seed1", "grpo", seed=1)
        joined = page.get_by_role("checkbox", name="grpo", exact=True)
        joined.wait_for()
        reader.wait()
        assert not joined.is_checked()
        assert joined.evaluate("box => box === document.activeElement")
        assert [trace["name"] for trace in reader.traces() if trace.get("name")] == ["es-seed0"]
        chosen = "id => document.getElementById(id).selectedOptions[0].textContent"
        assert [page.evaluate(chosen, each) for each in ("sample-run", "config-run")] == ["grpo, seed 0"] * 2
        assert "name: grpo-seed0" in page.text_content("#config")
        assert page.evaluate(f"{zoom}.range") == [400, 900]
        joined.check()
        reader.wait()
        assert "grpo" in [trace.get("name") for trace in reader.traces()]
        reader.choose("axis", "steps")
        assert page.evaluate(f"{zoom}.autorange") is True
        server.shutdown()
        reader.close()


def test_a_live_page_says_when_its_server_does_not_answer(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with watch.WatchServer([run]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.add_init_script(
            "const timeout = AbortSignal.timeout; AbortSignal.timeout = (ms) => timeout.call(AbortSignal, ms / 100);"
        )
        asked: list[Any] = []
        page.route("**/data.json", lambda route: asked.append(route))  # and no answer
        page.goto(server.url)
        page.wait_for_selector("#live.lost", timeout=TIMEOUT_MS)
        assert "lost its server" in page.text_content("#live")
        page.unroute("**/data.json")
        page.wait_for_selector("#live:not(.lost)", timeout=TIMEOUT_MS)
        assert asked
        page.close()
        server.shutdown()


def test_names_of_any_length_fit_on_a_phone(browser: Any, tmp_path: Path) -> None:
    for method in ("es", "grpo"):
        write_run(tmp_path / f"{method}-{'with-a-long-name-' * 4}", method)
    groups = group_runs([read_run(run) for run in find_runs([tmp_path])])
    write_report(tmp_path / "report.html", groups, title="Long names", pngs=False)
    reader = Reader(browser, (tmp_path / "report.html").as_uri(), width=400)
    assert reader.page.evaluate("document.documentElement.scrollWidth") == 400
    reader.close()


def test_a_run_that_is_not_shown_is_nowhere_in_the_plots(browser: Any, report: Path) -> None:
    reader = Reader(browser, report.as_uri())
    page = reader.page
    assert "seed 0" in page.text_content("#plot-population .legend")
    page.get_by_role("checkbox", name="es", exact=True).uncheck()
    reader.wait()
    page.click("#plot-time summary")
    page.wait_for_selector("#plot-time table")
    assert page.locator("#plot-time tbody th").all_text_contents() == ["grpo", "sft"]
    assert " es: " not in page.get_attribute("#plot-time .plot", "aria-label")
    spoken = page.get_attribute("#plot-population .plot", "aria-label")
    assert spoken.endswith("over processed tokens. No run is shown.")
    reader.close()


def test_a_live_page_that_began_empty_takes_the_axis_that_suits_its_runs(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SHARE_OF_TIME", float("inf"))
    with watch.WatchServer([tmp_path]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reader = Reader(browser, server.url)
        write_run(tmp_path / "sft", "sft")
        reader.page.wait_for_selector("#plot-held-out")
        reader.wait()
        assert reader.page.input_value("#axis") == "processed"
        assert reader.line("sft") == [0, 100, 200, 300]
        server.shutdown()
        reader.close()


def _append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _brightness(colour: str) -> int:
    """Of `rgb(r, g, b)`."""
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))
