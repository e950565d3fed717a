#!/usr/bin/env bash
# Gathers what a GPU machine without network lacks, for `bash tests/gpu.sh --wheels DIR` there (Python 3.12, Linux on
# x86-64, with torch, transformers, accelerate, pandas and pyarrow):   bash tests/gpu_wheels.sh DIR
# Run it where there is a network, with a Python that has torch, which DeepSpeed's build asks for. 8 MB, in seconds
set -euo pipefail
folder=${1:?give a folder for the wheels}
folder=${folder/#-/./-} # not to look like a flag
mkdir -p "$folder"
pip=(python -m pip --disable-pip-version-check)

"${pip[@]}" download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$folder" \
  hjson==3.1.0 pydantic==2.14.4 pydantic_core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 \
  typing-extensions==4.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 trl==1.12.0 peft==0.21.2

# Without operations built ahead this is a wheel for any machine. The one that is used, CPU Adam, is built at first use
CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu DS_BUILD_OPS=0 \
  "${pip[@]}" wheel -q --no-deps --no-build-isolation --wheel-dir "$folder" deepspeed==0.19.8

du -ch --apparent-size "$folder"/*.whl
