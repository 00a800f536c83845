"""Packaging of amd_fast. Nothing here imports torch: building and installing need neither a GPU nor the dependencies."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Device code lives in the top-level folder kernels/, which has no __init__.py because `kernels` is also another package's
# import name. Each subfolder is installed as amd_fast.kernels.<name>; amd_fast/kernels/__init__.py finds it in a source tree.
KERNELS = sorted(folder.parent.name for folder in (ROOT / "kernels").glob("*/__init__.py"))

INSTALL_REQUIRES = [
    "av>=18",
    "docstring-parser>=0.16",
    "jinja2>=3.1",
    "jsonargparse[signatures]>=4.44",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "opencv-python-headless>=4.10.0.84",
    "pandas>=2.2",
    "pillow>=10.3",
    "PyYAML>=6.0",
    "rich>=13.7",
    "safetensors>=0.4.5",
    "scikit-learn>=1.7",
    "scipy>=1.15",
    "statsmodels>=0.14.2",
    "tensorboard>=2.17",
    "torch>=2.11",
    "torchvision>=0.26",
    'triton>=3.6; platform_system == "Linux"',
]

EXTRAS_REQUIRE = {
    # Decoding on NVIDIA GPUs. DALI names its package after the CUDA version; this one matches torch's default wheels.
    "dali": ['nvidia-dali-cuda130>=2.0; platform_system == "Linux"'],
    # Videos, manifests and run folders on S3.
    "remote": ["s3fs>=2025.3"],
    # The web page of `amd-fast serve`.
    "web": ["fastapi>=0.115", "uvicorn>=0.30"],
    # Other libraries' backbones, training loops and model hub.
    "adapters": ["huggingface-hub>=0.30", "lightning>=2.4", "timm>=1.0.15", "transformers>=4.48"],
    # What the data benchmark is compared with.
    "peers": ['decord>=0.6; platform_system == "Linux"', "torchcodec>=0.10"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
    "test": [
        "axe-playwright-python>=0.1.4",
        "httpx>=0.27",
        "hypothesis>=6.100",
        "inferactively-pymdp>=1.0",
        "ipykernel>=6.29",
        "moto[s3,server]>=5.0.20",
        "nbclient>=0.10",
        "playwright>=1.48",
        "pytest>=8.2",
        "pytest-benchmark>=5.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
    ],
    "lint": ["mypy>=1.13", "pandas-stubs", "ruff>=0.8", "types-PyYAML"],
}


def version() -> str:
    """The version written in amd_fast/__init__.py, read as text so that building imports nothing."""
    text = (ROOT / "amd_fast" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("amd_fast/__init__.py does not define __version__")
    return found.group(1)


def long_description() -> str:
    """README.md, the text that package registries show."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="amd_fast",
    version=version(),
    description="Few-shot action recognition from video with several modalities, inferring clip by clip which one to trust",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["amd_fast", "amd_fast.*"]), *(f"amd_fast.kernels.{name}" for name in KERNELS)],
    package_dir={f"amd_fast.kernels.{name}": f"kernels/{name}" for name in KERNELS},
    package_data={
        "amd_fast": ["py.typed", "recipes/*.yaml"],
        "amd_fast.data": ["*.csv", "*.json", "tables/*.csv"],
        "amd_fast.evaluation": ["templates/*"],
        "amd_fast.web": ["static/*"],
        **{f"amd_fast.kernels.{name}": ["*.json", "configs/*.json"] for name in KERNELS},
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["amd-fast = amd_fast.cli:main"]},
    zip_safe=False,
)
