"""Look at the built site in a browser: `python docs/look.py docs/_build/html`.

Opens every page on a desktop (1280 x 800) and on a phone (390 x 844), light and dark, and prints faults: errors
on the console, images that do not load, a page wider than the window, text of little contrast, a menu that ends
below the fold. Needs the system's Chromium, and the extra `test`.

    python docs/look.py docs/_build/html --only "guide/*" --pictures /tmp/pictures
"""

import argparse
import contextlib
import fnmatch
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

WINDOWS = {"desktop": (1280, 800), "phone": (390, 844)}
SCHEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LEFT_OUT = ("_modules/*", "_static/*", "genindex.html", "py-modindex.html", "search.html")
CONTRAST = {"runOnly": ["color-contrast"], "resultTypes": ["violations"]}

MEASURE = """() => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const isBroken = (image) => image.complete && !image.naturalWidth;
  const images = [...document.images].filter(isBroken).map((image) => image.src);
  const menu = document.querySelector(".sidebar-tree")?.getBoundingClientRect();
  const isShown = menu && menu.width && menu.right > 0;
  return { wide, images, below: isShown ? menu.bottom - innerHeight : 0 };
}"""


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """The system's Chromium, without a window."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def faults(page: Page, address: str, complaints: list[str], *, contrast: bool) -> Iterator[str]:
    """The faults of a page, in words; with ``contrast`` also text of little contrast, which takes longest."""
    complaints.clear()
    page.goto(address, wait_until="load")
    page.evaluate(
        "document.querySelectorAll('img[loading=lazy]').forEach((each) => { each.loading = 'eager'; })"
    )
    page.wait_for_function("[...document.images].every((each) => each.complete)")
    if page.locator("html[data-refresh]").count():  # a report draws itself
        page.wait_for_selector("html[data-drawn=all]", state="attached")
    found = page.evaluate(MEASURE)
    yield from complaints
    if found["wide"] > 0:
        yield f"{found['wide']} pixels wider than the window"
    yield from (f"image not loaded: {each}" for each in found["images"])
    if found["below"] > 0:
        yield f"the menu ends {found['below']:.0f} pixels below the fold"
    violations = Axe().run(page, options=CONTRAST).response["violations"] if contrast else []
    for node in (node for violation in violations for node in violation["nodes"]):
        yield f"{node['any'][0]['message'].split(' (')[0]}: {node['target'][0]}"


def look(chromium: Browser, site: Path, pages: list[Path], pictures: Path | None) -> int:
    """Print the faults of all pages; returns their number."""
    number = 0
    for window, (width, height) in WINDOWS.items():
        for scheme in SCHEMES:
            context = chromium.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True
            )
            page, complaints = context.new_page(), []
            page.on(
                "console", lambda line, to=complaints: to.append(line.text) if line.type == "error" else None
            )
            page.on("pageerror", lambda error, to=complaints: to.append(str(error)))
            for path in pages:
                name = path.relative_to(site).as_posix()
                found = faults(page, path.as_uri(), complaints, contrast=window == "desktop")
                for fault in dict.fromkeys(found):
                    number += 1
                    print(f"{name}, {window}, {scheme}: {fault}", flush=True)
                if pictures is not None:
                    target = f"{name.removesuffix('.html').replace('/', '-')}-{window}-{scheme}.png"
                    page.screenshot(path=pictures / target, full_page=True)
            context.close()
    return number


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--only", default="*", help="pattern of the pages, such as guide/*")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each page")
    arguments = parser.parse_args()
    site = arguments.site.resolve()
    pages = [
        path
        for path in sorted(site.rglob("*.html"))
        for name in [path.relative_to(site).as_posix()]
        if fnmatch.fnmatch(name, arguments.only) and not any(fnmatch.fnmatch(name, each) for each in LEFT_OUT)
    ]
    if arguments.pictures is not None:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    with browser() as chromium:
        number = look(chromium, site, pages, arguments.pictures)
    print(f"{len(pages)} pages, {len(WINDOWS) * len(SCHEMES)} times each: {number} faults")
    return min(number, 1)


if __name__ == "__main__":
    sys.exit(main())
