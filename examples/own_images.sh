#!/bin/sh
# From a folder of images to a trained model, in two commands.
#
#     sh examples/own_images.sh photos runs/photos
#
# photos/ has one folder per class, with its images: photos/<class>/<image>. The result is in
# runs/photos: train.beton and val.beton, and the trained model with its report in run/. Run it in the
# repository. The recipe is ResNet-50 at 224 px for 100 epochs, for a GPU; further arguments are
# options of train_imagenet.py, such as --training.epochs=30 --model.arch=resnet18. After an
# interruption, run the same command again.
set -eu
images=${1:?give the folder of images} out=${2:?give the folder of the result}
shift 2

# 1. Divide the images into train and val (about 10 % of each class), and write both to one file each.
python write_ffcv.py --cfg.data_dir="$images" --cfg.write_path="$out" --cfg.val_share=0.1 \
    --cfg.max_resolution=500

# 2. Train. num_classes=0 takes the number of classes from the file; `expected` is the curve of
#    ImageNet, which the recipe would compare with.
python train_imagenet.py --config-file rsb_configs/sgd_100_warmup.yaml \
    --data.train_dataset="$out/train.beton" --data.val_dataset="$out/val.beton" \
    --model.num_classes=0 --logging.expected= --logging.folder="$out/run" "$@"
