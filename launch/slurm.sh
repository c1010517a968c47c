#!/usr/bin/env bash
# Trains on GPUs under SLURM, one process a GPU. Run it in the clone, on a file system that all
# nodes share.
#
#   bash launch/slurm.sh --nodes=4 --gpus=8 --partition=P --time=24:00:00 -- \
#     --config=configs/unigrpo.py --config.init_from=sft --config.prompts.source=prompts.jsonl \
#     --config.eval.source=held_out.jsonl --config.rewards="{'my_rewards:redness': 1.0}" \
#     --workdir=runs/unigrpo
#
# --nodes --gpus   how many, and GPUs of each; 1 and 8 unless given
# --partition      where; --account who pays; both the cluster's own unless given
# --time           limit, 24:00:00 unless given; five minutes before it the run saves itself,
#                  and the job queues again, as it does when it is preempted or ends with a
#                  status that trying again may cure: all but 0 and 2, a thousand times at most
# --name           of the job, unigrpo unless given; its output goes to NAME.log
# --dry-run        prints the command
#
# JAX finds the other processes through SLURM. CUDA 12 comes with requirements-gpu.txt; CUDA 13 with
# REQUIREMENTS=requirements-cuda13.txt before this command.
set -euo pipefail
flags="nodes gpus partition account time name"
nodes=1 gpus=8 partition="" account="" time=24:00:00 name=unigrpo
# shellcheck source=launch/shell.sh
source "$(dirname "$0")/shell.sh"
parse "$@"
[[ ${#words[@]} == 0 ]] || die "'${words[*]}' is no flag; the training's flags follow --"
for count in nodes gpus; do
  [[ ${!count} =~ ^[1-9][0-9]*$ ]] || die "--$count=${!count} is no count; give 1 or more"
done
check_training

options=(
  "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus"
  "--time=$time" "--output=$name.log" --open-mode=append --requeue --signal=TERM@300
)
if [[ -n $partition ]]; then options+=("--partition=$partition"); fi
if [[ -n $account ]]; then options+=("--account=$account"); fi
# Installed once: the tasks would do it all at once, in one folder.
cd "$(dirname "$0")/.."
do_ sbatch "${options[@]}" --wrap "set -e
bash launch/host.sh install --backend=gpu
status=0
srun bash launch/host.sh run --backend=gpu -- $(quoted "${rest[@]}") || status=\$?
if [ \$status != 0 ] && [ \$status != 2 ] && [ \${SLURM_RESTART_COUNT:-0} -lt 1000 ]; then
  scontrol requeue \$SLURM_JOB_ID
fi
exit \$status"
