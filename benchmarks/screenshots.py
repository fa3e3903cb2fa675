"""Screenshots of a report in Chromium: wide, on a phone, in dark mode, zoomed.

`python -m benchmarks.screenshots REPORT.html OUT` writes OUT/{wide,phone,dark,zoom}.png. It fails if the page's script
did not run, the page's policy blocked something, or the page is wider than its window. It needs `chromium` in PATH (or
CHROMIUM=...): apt-get install chromium.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PHONE, WIDE = 390, 1280
# Writes what it measures of the finished page into the document.
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const figures = [innerWidth, document.documentElement.scrollWidth, document.querySelectorAll("#layer option").length,
                document.querySelectorAll("button.zoom img").length,
                [...document.querySelectorAll("img")].filter((i) => i.src.length > 9 && !i.naturalWidth).length,
                performance.getEntriesByType("resource").filter((r) => r.name.startsWith("http")).length];
  document.body.dataset.figures = figures.join(" ");
  if (location.hash === "#zoom") document.querySelector("button.zoom").click();
}, 300));</script>"""


def chromium() -> str:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        sys.exit("screenshots: expected chromium in PATH, got none; apt-get install chromium")
    return path


def run(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=4000", *arguments, url,
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def main() -> None:
    page, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    url = page.as_uri()
    # Chromium's window is never narrower than 500 pixels, therefore the phone is a frame in another page.
    shots = {"wide": (WIDE, 3200, []), "dark": (WIDE, 3200, ["--blink-settings=preferredColorScheme=0"])}
    for name, (width, height, extra) in shots.items():
        done = run(url, f"--window-size={width},{height}", f"--screenshot={out / name}.png", *extra)
        complaints = re.findall(r"CONSOLE.*", done.stderr)
        assert not complaints, complaints
    with tempfile.TemporaryDirectory() as folder:
        # A copy with PROBE and without the policy, which would block PROBE.
        probed = Path(folder) / "probed.html"
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
        probed.write_text(text.replace("</body>", f"{PROBE}</body>"))
        frame = Path(folder) / "phone.html"
        frame.write_text(f'<body style="margin:0"><iframe src="{url}" style="border:0;width:{PHONE}px;height:3400px">')
        run(frame.as_uri(), f"--window-size={PHONE + 120},3400", f"--screenshot={out / 'phone'}.png")
        run(f"{probed.as_uri()}#zoom", f"--window-size={WIDE},900", f"--screenshot={out / 'zoom'}.png")
        document = run(probed.as_uri(), f"--window-size={WIDE},900", "--dump-dom").stdout
    figures = re.search(r'data-figures="([^"]*)"', document)
    assert figures, "the page's script did not run to its end"
    inner, scroll, layers, pictures, broken, loads = map(int, figures[1].split())
    print(f"{page.name}: {page.stat().st_size / 1e6:.2f} MB, {pictures} pictures, {layers} layers to choose from")
    assert (broken, loads) == (0, 0), f"{broken} broken pictures, {loads} loads from elsewhere"
    assert scroll <= inner, f"{scroll} px wide in a window of {inner}"


if __name__ == "__main__":
    main()
