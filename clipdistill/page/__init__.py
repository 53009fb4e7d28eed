"""The search page: one static file, with the service behind it or with an engine that runs in the visitor's browser."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources

ENGINE = ("engine.js", "pixels.js")
"""The modules of the engine that searches in the browser."""

# All that the page knows of the service is this object; the bundle's does the same in the browser.
_SERVICE = re.compile(rb"const service = \{\n.*?\n\};\n", re.DOTALL)
_IN_BROWSER = """\
const engine = import("./engine.js").then((module) => module.open(), (fault) => {
  throw new Problem("The search could not be loaded", `${fault.message}. Is every file of the bundle at this address?`);
});
const LOADING = "Loading the search…";
el("status").textContent = LOADING;
const ready = () => { if (el("status").textContent === LOADING) el("status").textContent = ""; };
engine.then(ready, () => {});  // of a fault who asks is told
const titled = (fault) => fault.title ? new Problem(fault.title, fault.message) : fault;
const service = {
  async info() { try { return (await engine).info(); } catch (fault) { throw titled(fault); } },
  async search(query, k, compare, signal) {
    try { return await (await engine).search(query, k, signal); } catch (fault) { throw titled(fault); }
  },
};
""".encode()


@dataclass(frozen=True, slots=True)
class Page:
    """The page, and the policy that lets a browser run it and nothing else.

    Attributes:
        html: The file's bytes.
        policy: Its Content-Security-Policy; script and style are allowed by their SHA-256.
    """

    html: bytes
    policy: str


def load_page() -> Page:
    """Read the page out of the package, as a service gives it to a browser."""
    html = asset("index.html")
    return Page(html, f"{_policy(html)}; frame-ancestors 'none'")


def bundled_page() -> Page:
    """The same page with the engine in the service's place, its policy in its head: no host need send it.

    ONNX Runtime's WebAssembly is compiled in the page, and its modules lie beside it.
    """
    html, count = _SERVICE.subn(lambda _: _IN_BROWSER, asset("index.html"))
    if count != 1:
        raise RuntimeError(f"index.html: {count} objects called service, expected one")
    policy = _policy(html, b"'self' 'wasm-unsafe-eval' ")
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'.encode()
    return Page(html.replace(b'<meta charset="utf-8">\n', b'<meta charset="utf-8">\n' + meta, 1), policy)


def asset(name: str) -> bytes:
    """One of the page's files."""
    return resources.files(__name__).joinpath(name).read_bytes()


def _policy(html: bytes, scripts: bytes = b"") -> str:
    return (
        f"default-src 'none'; script-src {scripts.decode()}{_hashes(html, b'script')}; "
        f"style-src {_hashes(html, b'style')}; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'"
    )


def _hashes(html: bytes, tag: bytes) -> str:
    parts = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)
