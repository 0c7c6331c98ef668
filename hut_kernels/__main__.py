"""`python -m hut_kernels`: versions, devices, and which backends run here and why others do not."""

import platform

import torch

from . import __version__, backends


def main() -> None:
    """Prints what a bug report needs."""
    print(f"hut_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for index, name in enumerate(devices):
        print(f"device {index}: {name}")
    if not devices:
        print(f"no CUDA device; CPU with {torch.get_num_threads()} threads")
    for name, state in backends().items():
        verdict = "available" if state["available"] else "not available"
        version = f" {state['version']}" if state["version"] else ""
        print(f"backend {name}{version}: {verdict} ({state['reason']})")


if __name__ == "__main__":
    main()
