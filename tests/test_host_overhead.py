"""benchmarks/host_overhead.py runs, and its `--check` can fail. Its figures are not looked at."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "host_overhead.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("host_overhead", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(NUM_TURNS=4, ADMITTED_TOKENS=(64,))
    return module


@pytest.mark.parametrize(("budget_ms", "code"), [(1e6, 0), (0.0, 1)])
def test_check(
    script: ModuleType, budget_ms: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    vars(script).update(BUDGET_MS={2: budget_ms})
    assert script.main(["--check"]) == code
    assert script.main([]) == 0
    captured = capsys.readouterr()
    assert ("over budget: 2 requests" in captured.err) == bool(code)
    rows = [line.split() for line in captured.out.splitlines() if line.strip().startswith("2 ")]
    assert len(rows) == 6  # streamed, at the end, several steps; twice
