import pytest
from pydantic import BaseModel, ConfigDict

from clipdistill.core import toml
from clipdistill.core.errors import ConfigError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    colour: str = "red"
    count: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()


def test_every_fault_is_told_at_once_with_its_path_and_the_nearest_key():
    made, faults = toml.validate(Outer, {"inner": {"color": "x", "count": "3"}, "size": 1})
    assert made is None
    assert "inner.color: unknown key; did you mean 'colour'?" in faults
    assert "size: unknown key; did you mean 'sizes'?" in faults
    assert any(fault.startswith("inner.count:") and "'3'" in fault for fault in faults)


def test_overrides_take_toml_values_and_plain_words():
    raw = {"inner": {"count": 1}}
    assert list(toml.apply_overrides(raw, ["inner.count=2", "inner.colour=blue", "sizes=[1, 2]", "a.b.c=true"])) == []
    assert raw == {"inner": {"count": 2, "colour": "blue"}, "sizes": [1, 2], "a": {"b": {"c": True}}}


def test_overrides_that_cannot_be_applied_are_faults():
    raw = {"name": "x"}
    faults = list(toml.apply_overrides(raw, ["nothing", "=3", "name.deeper=1"]))
    assert len(faults) == 3
    assert raw == {"name": "x"}


def test_overrides_reach_into_a_lists_items_by_number():
    raw = {"a": {"list": [{"k": 1}, {"k": 2}, 3]}}
    assert list(toml.apply_overrides(raw, ["a.list.1.k=5", "a.list.0.new.deeper=x"])) == []
    assert raw == {"a": {"list": [{"k": 1, "new": {"deeper": "x"}}, {"k": 5}, 3]}}
    faults = list(toml.apply_overrides(raw, ["a.list.3.k=5", "a.list.2.k=5", "a.list.x.k=5", "a.list.-1.k=5"]))
    assert faults[0] == "a.list.3.k: a.list.3 is not a section"
    assert len(faults) == 4


def test_what_is_written_reads_back_equal(tmp_path):
    values = {
        "name": 'a "quoted" näme\n',
        "on": True,
        "rate": 1e-05,
        "list": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.5}],
        "table": {"k": 1, "deeper": {"x": [1, 2]}},
    }
    path = tmp_path / "a.toml"
    path.write_text(toml.write(values), encoding="utf-8")
    assert toml.read(path) == values


@pytest.mark.parametrize("data", [b"a = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_named(tmp_path, data):
    path = tmp_path / "a.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.toml"):
        toml.read(path)
    with pytest.raises(ConfigError, match="no such file"):
        toml.read(tmp_path / "b.toml")
