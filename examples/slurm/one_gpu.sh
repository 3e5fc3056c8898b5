#!/bin/bash
# Trains on one GPU. Submit it in the repository:
#
#     sbatch examples/slurm/one_gpu.sh --logging.folder=runs/a2_300
#
# Arguments are options of train_imagenet.py. runs/a2_300 is the folder of the run. Options of
# sbatch before the script's name replace the #SBATCH lines; PYTHON=... names another interpreter.
# Before the time limit, the run saves and ends with status 75. The job then requeues itself and
# continues in the same folder, until the run is finished.

# Edit: partition, time, CPUs (the loader uses all of them), and the recipe below.
#SBATCH --job-name=a2_300
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "${PYTHON:-.venv/bin/python}" \
    train_imagenet.py --config-file rsb_configs/a2_300.yaml "$@"
status=$?
[ $status != 75 ] || exec scontrol requeue "$SLURM_JOB_ID"
exit $status
