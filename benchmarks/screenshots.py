"""Look at a report as people do: in a real Chromium, wide, on a phone, in the dark.

`python -m benchmarks.screenshots REPORT.html OUT` writes OUT/{wide,phone,dark,zoom}.png and fails where the page's
script did not run, something was refused by its policy, or it is wider than its window. Needs a `chromium` in
PATH (or CHROMIUM=...): apt-get install chromium.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PHONE, WIDE = 390, 1280
# What the page is asked once it has been drawn; its answers are read from the document.
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const said = [innerWidth, document.documentElement.scrollWidth, document.querySelectorAll("#layer option").length,
                document.querySelectorAll("button.zoom img").length,
                [...document.querySelectorAll("img")].filter((i) => i.src.length > 9 && !i.naturalWidth).length,
                performance.getEntriesByType("resource").filter((r) => r.name.startsWith("http")).length];
  document.body.dataset.said = said.join(" ");
  if (location.hash === "#zoom") document.querySelector("button.zoom").click();
}, 300));</script>"""


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        sys.exit("screenshots: expected chromium in PATH, got none; apt-get install chromium")
    return found


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
    plain = page.as_uri()
    # Chromium's own window is never narrower than 500: a phone is a frame of its width in a page of ours.
    shots = {"wide": (WIDE, 3200, []), "dark": (WIDE, 3200, ["--blink-settings=preferredColorScheme=0"])}
    for name, (width, height, extra) in shots.items():
        done = run(plain, f"--window-size={width},{height}", f"--screenshot={out / name}.png", *extra)
        complaints = re.findall(r"CONSOLE.*", done.stderr)
        assert not complaints, complaints
    with tempfile.TemporaryDirectory() as folder:
        # The copy asks; its policy is taken off so that the question may be put.
        asking = Path(folder) / "asking.html"
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
        asking.write_text(text.replace("</body>", f"{PROBE}</body>"))
        frame = Path(folder) / "phone.html"
        frame.write_text(
            f'<body style="margin:0"><iframe src="{plain}" style="border:0;width:{PHONE}px;height:3400px">'
        )
        run(frame.as_uri(), f"--window-size={PHONE + 120},3400", f"--screenshot={out / 'phone'}.png")
        run(f"{asking.as_uri()}#zoom", f"--window-size={WIDE},900", f"--screenshot={out / 'zoom'}.png")
        said = run(asking.as_uri(), f"--window-size={WIDE},900", "--dump-dom").stdout
    found = re.search(r'data-said="([^"]*)"', said)
    assert found, "the page's script did not run to its end"
    inner, scroll, layers, pictures, broken, loads = map(int, found[1].split())
    print(f"{page.name}: {page.stat().st_size / 1e6:.2f} MB, {pictures} pictures, {layers} layers to choose from")
    assert (broken, loads) == (0, 0), f"{broken} broken pictures, {loads} loads from elsewhere"
    assert scroll <= inner, f"{scroll} px wide in a window of {inner}"


if __name__ == "__main__":
    main()
