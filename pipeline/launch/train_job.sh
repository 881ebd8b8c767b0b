# One launcher per node, whose task number is the rank of its machine; they meet at the first node, where this script
# runs too. Notice goes to the launcher of that node alone: signals to a step reach every process in it, workers of the
# data loader and the tracker's among them. All ranks then agree to stop. It is repeated, since it is lost on a
# launcher that is only starting.

launcher={{ folder }}/launcher-$SLURM_JOB_ID.pid
rm -f "$launcher"
asked= step=
running() { [[ $step ]] && kill -0 "$step" 2>/dev/null; }

hand_on() {
  while running; do
    kill -USR2 "$(cat "$launcher")" 2>/dev/null || true
    sleep 2
  done
}

stop() {
  trap '' USR2
  asked=1
  echo "job $SLURM_JOB_ID: asked to stop on $(date)"
  hand_on
}
trap stop USR2

port=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 10000))
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait={{ wait_s }} \
  --output={{ folder_pattern }}/{{ name }}-%j-node%n.log --open-mode=append bash -c '
  trap "" USR2
  ((SLURM_PROCID > 0)) || echo $$ >"$0"
  exec "$@" --machine_rank="$SLURM_PROCID" --main_process_ip="$SLURM_LAUNCH_NODE_IPADDR"
' "$launcher" {{ command }} --main_process_port="$port" &
step=$!
if [[ $asked ]]; then # before there was anything to stop
  hand_on
fi
while running; do
  wait "$step" || true # a signal ends it too
done
status=0
wait "$step" || status=$?
rm -f "$launcher"
if [[ $asked ]] && ((status != 0 && status != {{ mistake }})); then
  status={{ stopped }} # whatever was under way, what was kept before stands
fi
echo "job $SLURM_JOB_ID: {{ what }} ended with status $status on $(date)"
{% if requeue %}
if ((status == {{ stopped }})); then
  scontrol requeue "$SLURM_JOB_ID"
fi
{% endif %}
exit "$status"
