#!/bin/bash
# Trains on all GPUs of several nodes, with one process for each GPU. Submit it in the repository:
#
#     sbatch examples/slurm/several_nodes.sh --logging.folder=runs/a2_300
#
# Arguments are options of train_imagenet.py. All nodes share the folder of the run, runs/a2_300
# here. Options of sbatch before the script's name replace the #SBATCH lines; PYTHON=... names
# another interpreter. Before the time limit, and after `scontrol requeue`, the run saves and ends
# with status 75. The job then continues in the same folder, also on other nodes, until the run is
# finished.

# Edit: partition, time, GPUs, one task for each GPU, CPUs of each (the loader uses all of them),
# and the recipe below.
#SBATCH --job-name=a2_300
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# --wait: 60 s after the first process has ended, the others end. Without it, the others wait up to
# 10 min for one that fails before all have connected
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=60 "${PYTHON:-.venv/bin/python}" \
    train_imagenet.py --config-file rsb_configs/a2_300.yaml "$@"
status=$?
[ $status != 75 ] || exec scontrol requeue "$SLURM_JOB_ID"
exit $status
