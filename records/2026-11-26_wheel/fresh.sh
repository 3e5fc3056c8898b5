#!/bin/sh
# usage: fresh.sh WHEEL PYTHON, as root. Installs the wheel into a new virtual environment and runs
# the programs in an empty folder, with no compiler and without the system's libturbojpeg.
set -eu
if [ -z "${3:-}" ]; then exec unshare --mount "$0" "$1" "$2" hidden; fi
for file in /usr/bin/*gcc* /usr/bin/*g++* /usr/bin/cc /usr/bin/c++ /usr/bin/*clang* /usr/bin/c89* /usr/bin/c99* \
    /usr/lib/*/libturbojpeg.so.0 /usr/lib/*/libjpeg.so*; do
    [ ! -f "$file" ] || mount --bind /dev/null "$file"
done
unset CC CXX LD_LIBRARY_PATH PYTHONPATH
folder=$(mktemp -d); cd "$folder"
timed() { echo "\$ $*"; start=$(date +%s); "$@"; echo "  ($(($(date +%s) - start)) s)"; }
echo 'int main;' > a.c
for name in gcc g++ cc c++ clang; do ! "$name" a.c 2>/dev/null || echo "error: $name works"; done
rm a.c
ls -lL /usr/lib/*/libturbojpeg.so.0
timed "$2" -m venv environment
timed environment/bin/pip install -q "$1"
environment/bin/python --version
environment/bin/pip list > versions.txt
timed environment/bin/pip check
PATH="$folder/environment/bin:/usr/bin:/bin"
timed write_ffcv --cfg.dataset=demo --cfg.data_dir=demo/images --cfg.write_path=demo --cfg.num_workers=2
timed write_ffcv verify --cfg.path=demo/val.beton
timed train_imagenet --config-file rsb_configs/demo.yaml
cat > example.py <<'P'
from rsb_ffcv import TrainLoader

loader = TrainLoader("demo/train.beton", batch_size=256, resolution=224, num_workers=8, seed=0)
for epoch in range(2):
    for images, labels, slots in loader.epoch(epoch):
        print(epoch, images.dtype, tuple(images.shape), labels.dtype, tuple(labels.shape), slots.dtype)
loader.close()
print(*{line.split()[-1] for line in open("/proc/self/maps") if "turbojpeg" in line}, sep="\n")
P
timed python example.py
timed train_imagenet --config-file rsb_configs/a2.yaml || echo "exit status $?"
timed train_imagenet --config-file rsb_configs/demo.yaml --logging.folder=other --compute.compile=1 || echo "exit status $?"
timed train_imagenet doctor --config-file rsb_configs/a2_300.yaml --data.train_dataset=demo/train.beton --data.val_dataset=demo/val.beton --data.in_memory=1 --logging.folder=other || echo "exit status $?"
timed python -c "import rsb_ffcv.ffcv" || echo "exit status $?"
du -sh environment
echo "$folder"
