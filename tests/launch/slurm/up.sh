#!/usr/bin/env bash
# A real SLURM on this machine alone: two virtual nodes on loopback, partitions low and high, of
# which high preempts low. No systemd, no cgroups, no accounting; everything lives in one folder.
#
#     tests/slurm/up.sh FOLDER && export SLURM_CONF=FOLDER/slurm.conf && sinfo
#     tests/slurm/down.sh FOLDER
#
# Debian and Ubuntu: apt-get install --no-install-recommends munge slurmctld slurmd slurm-client
set -euo pipefail
folder=$(realpath -m "${1:?usage: up.sh FOLDER}")
first_port=${SLURM_TEST_PORT:-17100}
[ ! -e "$folder/pids" ] || { echo "$folder is up already: down.sh $folder" >&2; exit 1; }
mkdir -p -m 755 "$folder"/{keys,munge,state,log}
chmod 700 "$folder/keys"
cd "$folder"

start() {  # start NAME COMMAND...: in the background, its output and its pid noted
  local name=$1; shift
  setsid "$@" > "log/$name" 2>&1 < /dev/null &
  echo "$! $name" >> pids
}

until_true() {  # until_true COMMAND...: for at most 20 seconds
  for _ in $(seq 200); do
    if timeout 5 "$@" > /dev/null 2>&1; then return; fi
    sleep 0.1
  done
  echo "in vain for 20 seconds: $*; see $folder/log" >&2
  exit 1
}

(umask 077 && head -c 128 /dev/urandom > keys/munge.key)
# --force: the folder may be one that other users cannot enter.
start munged munged --foreground --force --socket="$folder/munge/socket" --key-file="$folder/keys/munge.key" \
  --pid-file="$folder/keys/munged.pid" --seed-file="$folder/keys/seed" \
  --log-file="$folder/log/munge"
until_true munge --no-input --socket="$folder/munge/socket"

# The nodes are called like addresses of this machine, as jax.distributed looks up the first name.
# cred_expire is also how long a requeued job waits before it starts again: 120 s, also below 5.
cpus=$(nproc)
cat > slurm.conf << CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$first_port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
ReturnToService=2
MinJobAge=3600
NodeName=127.0.0.2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((first_port + 1)) CPUs=$cpus
NodeName=127.0.0.3 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((first_port + 2)) CPUs=$cpus
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONF
echo CgroupPlugin=cgroup/v1 > cgroup.conf  # loaded, and used by none of the plugins above
export SLURM_CONF=$folder/slurm.conf

start slurmctld slurmctld -D
until_true scontrol ping
for node in 127.0.0.2 127.0.0.3; do
  mkdir -p "spool.$node"
  start "slurmd-$node" slurmd -D -N "$node"
done
until_true bash -c '[ "$(sinfo --noheader --Node --partition=low --states=idle | wc -l)" = 2 ]'
sinfo
