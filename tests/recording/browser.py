"""The system's Chromium, driven by Playwright, whose own browsers are not used."""

import contextlib
import json
import shutil

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium():
    """A browser without a window, with an empty profile."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed; on Debian: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright, see the extra "test"')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """An open page, with all its requests and complaints."""

    def __init__(self, browser, path, width=1280, scheme="light"):
        self.path = path
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on(
            "console",
            lambda line: (
                self.complaints.append(line.text)
                if line.type in ("error", "warning", "trace", "assert")
                else None
            ),
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())
        self.settle()

    def settle(self):
        """Wait until a frame with all changes so far is drawn."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.wait_for_selector("html[data-drawn=all]", state="attached")

    def set(self, control, value):
        """Move a slider, or choose from a list."""
        element = self.page.locator(f"#{control}")
        if element.evaluate("(each) => each.tagName") == "SELECT":
            element.select_option(value)
        else:
            element.fill(str(value))
        self.settle()

    def set_threshold(self, threshold):
        self.set("threshold", self.page.evaluate("page.thresholds").index(threshold))

    def table(self):
        """Rows as dicts, with exact numbers (None where there is none) and the texts of layers."""
        rows = self.page.evaluate(
            """() => {
              const titles = [...document.querySelectorAll("#headings button")].map((each) => each.textContent);
              const cell = (each) => each.querySelector("data")?.value ?? each.textContent;
              return [...document.querySelectorAll("#rows tr")].map((row) =>
                Object.fromEntries([...row.children].map((each, index) => [titles[index], cell(each)])));
            }"""
        )
        words = ("run", "layer", "type", "what stands out")
        return [
            {key: cell if key in words else float(cell) if cell else None for key, cell in row.items()}
            for row in rows
        ]

    def chart(self, name, what="data"):
        """The traces of a chart, as Plotly has them."""
        found = self.page.evaluate(f"JSON.stringify(document.getElementById({name!r}).{what})")
        return json.loads(found)

    def click(self, chart, x, y):
        """Click at a point of a chart's axes."""
        self.page.locator(f"#{chart}").scroll_into_view_if_needed()
        place = self.page.evaluate(
            """([chart, x, y]) => {
              const element = document.getElementById(chart);
              const box = element.getBoundingClientRect();
              const { xaxis, yaxis } = element._fullLayout;
              return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
            }""",
            [chart, x, y],
        )
        self.page.mouse.move(*place)
        self.page.mouse.click(*place)
        self.settle()

    def leave(self):
        """Close the page; it must have no complaints and no other requests."""
        assert self.complaints == []
        assert self.requests == [self.path.as_uri()]
        assert self.page.evaluate("performance.getEntriesByType('resource').length") == 0
        self.context.close()
