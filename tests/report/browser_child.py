"""Looks at a page in Chromium (Qt WebEngine, without a screen) and prints what it saw as JSON.

Arguments: the page, the width of the window in pixels, `light` or `dark`.
"""

from __future__ import annotations

import json
import os
import sys

page_path, width, scheme = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"
# 0 and 1 are dark and light in Chromium's settings
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
    f"--disable-gpu --blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
)

from PySide6.QtCore import QTimer, QUrl  # noqa: E402
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor  # noqa: E402
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402

SEEN = """JSON.stringify({
  width: innerWidth, page_width: document.documentElement.scrollWidth,
  ground: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  font: parseFloat(getComputedStyle(document.body).fontSize),
  charts: document.querySelectorAll('svg').length,
  drawn: [...document.querySelectorAll('svg')].filter(svg =>
    [...svg.querySelectorAll('polyline, circle')].some(line => {
      const box = line.getBoundingClientRect();
      return box.width + box.height > 1 && getComputedStyle(line).stroke != 'none'; })).length,
  narrowest: Math.min(...[...document.querySelectorAll('th')].map(cell =>
    cell.getBoundingClientRect().width)),
})"""

seen: dict[str, object] = {"console": [], "requests": []}


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        seen["console"].append(message)


class Requests(QWebEngineUrlRequestInterceptor):
    def interceptRequest(self, info):
        seen["requests"].append(info.requestUrl().toString())


app = QApplication(sys.argv[:1])
view = QWebEngineView()
page = Page(view)
requests = Requests()
page.setUrlRequestInterceptor(requests)
view.setPage(page)
view.resize(width, 900)
view.show()


def found(text: str) -> None:
    seen.update(json.loads(text))
    print("SEEN " + json.dumps(seen), flush=True)
    app.quit()


def loaded(is_right: bool) -> None:
    seen["loaded"] = is_right
    page.runJavaScript(
        "document.querySelectorAll('details').forEach(part => part.open = true)",
        lambda _: page.runJavaScript(SEEN, found),
    )


page.loadFinished.connect(loaded)
view.load(QUrl.fromLocalFile(page_path))
QTimer.singleShot(60_000, app.quit)
app.exec()
