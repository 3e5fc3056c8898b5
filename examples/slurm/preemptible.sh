#!/bin/bash
# Trains on a partition whose jobs are preempted (PreemptMode=REQUEUE). Submit it in the repository:
#
#     sbatch examples/slurm/preemptible.sh --logging.folder=runs/a2_300
#
# Arguments are options of train_imagenet.py. runs/a2_300 is the folder of the run. Options of
# sbatch before the script's name replace the #SBATCH lines; PYTHON=... names another interpreter.
# SLURM preempts a job with SIGTERM, kills it after KillWait (30 s if the cluster does not set
# it), and requeues it. The run saves in this time, or continues from its last checkpoint. At the
# time limit the job requeues itself.

# Edit: partition, time, GPUs, one task for each GPU, CPUs of each (the loader uses all of them),
# and the recipe below.
#SBATCH --job-name=a2_300
#SBATCH --partition=preemptible
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# --wait: 60 s after the first process has ended, the others end. Without it, the others wait up to
# 10 min for one that fails before all have connected.
# every_minutes: what is lost at most if a job is killed before it has saved
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=60 "${PYTHON:-.venv/bin/python}" \
    train_imagenet.py --config-file rsb_configs/a2_300.yaml --checkpoint.every_minutes=5 "$@"
status=$?
[ $status != 75 ] || exec scontrol requeue "$SLURM_JOB_ID"
exit $status
