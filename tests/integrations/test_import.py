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
