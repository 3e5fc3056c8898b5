"""Writes labelled images into .beton files:
python write_ffcv.py --cfg.data_dir=/data/imagenet --cfg.write_path=/data/beton --cfg.max_resolution=500"""
import sys

from rsb_ffcv import exit_status
from rsb_ffcv.config import WriteConfig, read_config


def main():
    config = read_config(WriteConfig, __doc__)
    from rsb_ffcv.dataset import write_splits  # ffcv takes seconds to import: wrong options are told of before

    write_splits(config.cfg.dataset, config.cfg.data_dir, config.cfg.write_path, config.cfg.split, config.cfg.subset,
                 config.cfg.num_workers, config.cfg.chunk_size, mode=config.cfg.write_mode,
                 max_resolution=config.cfg.max_resolution, jpeg_quality=config.cfg.jpeg_quality,
                 smart_threshold=config.cfg.smart_threshold, compress_probability=config.cfg.compress_probability)


if __name__ == "__main__":
    sys.exit(exit_status(main))
