#!/usr/bin/env bash
# start.sh FOLDER: a one-node SLURM with four simulated GPUs, all of its state below FOLDER; prints the SLURM_CONF to export. `stop.sh FOLDER` ends it.
# Needs root and Debian's slurm-wlm and munge. No systemd, no cgroups: proctrack/linuxproc, task/none; more CPUs than there are (config_overrides).
set -euo pipefail
here=$1; mkdir -p "$here"/{state,spool,log,munge}
host=$(hostname -s)
chmod 755 "$here"; chmod 700 "$here/munge"
head -c 128 /dev/urandom > "$here/munge/key"; chmod 400 "$here/munge/key"
munged --force --key-file="$here/munge/key" --socket="$here/munge/socket" --pid-file="$here/munge/pid" --log-file="$here/munge/log" --seed-file="$here/munge/seed"
chmod 711 "$here/munge"
for i in 0 1 2 3; do rm -f "$here/gpu$i"; mknod "$here/gpu$i" c 1 3; done                 # null devices
cat > "$here/gres.conf" <<EOF
NodeName=$host Name=gpu File=$here/gpu[0-3]
EOF
cat > "$here/slurm.conf" <<EOF
ClusterName=toy
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=46817
SlurmdPort=46818
AuthType=auth/munge
AuthInfo=socket=$here/munge/socket
SlurmUser=root
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool
SlurmctldPidFile=$here/slurmctld.pid
SlurmdPidFile=$here/slurmd.pid
SlurmctldLogFile=$here/log/slurmctld.log
SlurmdLogFile=$here/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=2
MinJobAge=60
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
PartitionName=toy Nodes=$host Default=YES MaxTime=60 State=UP
EOF
export SLURM_CONF=$here/slurm.conf
slurmctld -c
slurmd -c
for _ in $(seq 60); do sinfo -h -o %T 2>/dev/null | grep -qx idle && { echo "$SLURM_CONF"; exit 0; }; sleep 0.5; done
echo "SLURM did not come up:" >&2; tail -5 "$here"/log/*.log >&2; exit 1
