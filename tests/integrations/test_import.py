"""Nobody pays for an integration, or needs its library, who does not import it."""

import subprocess
import sys

CODE = """
import sys
import hut_kernels
import hut_kernels.integrations
found = sorted({name.partition(".")[0] for name in sys.modules} & {"peft", "transformers"})
assert not found, found
"""


def test_the_package_imports_neither_peft_nor_transformers():
    subprocess.run([sys.executable, "-c", CODE], check=True)


OLD_PEFT = """
import sys
import types
sys.modules["peft"] = types.ModuleType("peft")
sys.modules["peft"].__version__ = "0.19.1"
import hut_kernels.integrations.peft
"""


def test_an_old_peft_is_refused_by_a_sentence():
    found = subprocess.run([sys.executable, "-c", OLD_PEFT], capture_output=True, text=True)
    assert found.returncode == 1
    assert "ImportError: hut_kernels.integrations.peft needs PEFT 0.20" in found.stderr
