"""The two forms of the page: with the service behind it, and with the engine that searches in the browser."""

import base64
import hashlib
import re

import pytest

from clipdistill import page


def hashes(html, tag):
    parts = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), html, re.DOTALL)
    return {f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts}


def test_only_the_service_differs():
    served, bundled = page.load_page().html.decode(), page.bundled_page().html.decode()
    assert served == page.asset("index.html").decode()
    before, after = served.split("const service = {\n")
    assert "fetch(" in after.split("\n};\n")[0]
    assert bundled.endswith(after.split("\n};\n", 1)[1])
    head, _, rest = bundled.partition('<meta http-equiv="Content-Security-Policy" content="')
    assert before.startswith(head) and rest.partition('">\n')[2].startswith(before[len(head) :])
    assert bundled.count("const service = {") == bundled.count('import("./engine.js")') == 1


def test_both_policies_allow_their_own_script_and_style_and_no_other_host():
    for one in (page.load_page(), page.bundled_page()):
        directives = dict(part.split(" ", 1) for part in one.policy.split("; "))
        for tag in (b"script", b"style"):
            assert hashes(one.html, tag) <= set(directives[f"{tag.decode()}-src"].split())
        assert "http" not in one.policy and "unsafe-inline" not in one.policy
        assert directives["default-src"] == "'none'"
    assert f'content="{page.bundled_page().policy}"' in page.bundled_page().html.decode()


def test_a_page_without_the_object_is_an_error(monkeypatch):
    monkeypatch.setattr(page, "asset", lambda name: b"<script>nothing</script>")
    with pytest.raises(RuntimeError, match="0 objects called service"):
        page.bundled_page()
