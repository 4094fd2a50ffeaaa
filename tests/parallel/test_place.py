"""Which process this is, as Slurm, Kubernetes or a person says it."""

import pytest

from gemjax.parallel.place import Place, ProcessError, expand_hosts, resolve

# Two nodes of four GPUs each, as `srun` sets them; see srun(1), "OUTPUT ENVIRONMENT VARIABLES".
SLURM = {
  "SLURM_JOB_ID": "1000",
  "SLURM_STEP_ID": "0",
  "SLURM_NTASKS": "8",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
  "SLURM_NODEID": "1",
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_STEP_NODELIST": "gpu[07-08]",
  "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
  "SLURM_GPUS_ON_NODE": "4",
  "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
JAX = {
  "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:4000",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "2",
}


@pytest.mark.parametrize(
  ("text", "hosts"),
  [
    ("node001", ["node001"]),
    ("node[001-003,007],login", ["node001", "node002", "node003", "node007", "login"]),
    ("a[8-10]", ["a8", "a9", "a10"]),
    ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
  ],
)
def test_slurms_lists_of_hosts(text, hosts):
  assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "node[a-b]"])
def test_no_list_of_hosts(text):
  with pytest.raises(ProcessError, match="SLURM_STEP_NODELIST"):
    expand_hosts(text)


def test_alone():
  assert resolve({}) == Place()
  # A batch script without srun has these, and is no step.
  assert resolve({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Place()


def test_one_process_a_gpu_of_slurm_that_sees_all_of_its_node_takes_its_own():
  place = resolve(SLURM)
  assert (place.index, place.count, place.devices) == (5, 8, (1,))
  assert place.hosts == ("gpu07",) * 4 + ("gpu08",) * 4
  host, port = place.address.split(":")
  assert host == "gpu07" and 61_440 <= int(port) < 65_536


@pytest.mark.parametrize(
  "bound",
  [
    {"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"},  # --gpus-per-task=1, jax#28194
    {"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"},
    {"SLURM_GPUS_PER_TASK": "h100:1", "CUDA_VISIBLE_DEVICES": "GPU-5f3"},
    {"CUDA_VISIBLE_DEVICES": "2"},  # --gpu-bind=single:1, jax#23452
    {"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "0,1"},
  ],
)
def test_a_task_that_sees_its_own_gpus_alone_takes_all_of_them(bound):
  assert resolve(SLURM | bound).devices is None


@pytest.mark.parametrize("gpus", [{}, {"SLURM_GPUS_PER_TASK": "4"}])
def test_one_process_a_node_takes_all_gpus_of_it(gpus):  # jax#16788
  one = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
  place = resolve(SLURM | one | gpus | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
  assert (place.index, place.count, place.devices) == (1, 2, None)
  assert place.hosts == ("gpu07", "gpu08")


def test_two_gpus_a_task_and_no_binding():
  given = SLURM | {"SLURM_GPUS_PER_TASK": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
  assert resolve(given | {"SLURM_LOCALID": "1"}).devices == (2, 3)


def test_more_tasks_than_gpus_are_refused():  # jax#29669
  with pytest.raises(ProcessError, match="8 tasks of Slurm share 4 GPUs"):
    resolve(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8"} | {"SLURM_NODEID": "0"})


def test_tasks_whose_gpus_are_hidden_share_none():
  hidden = {"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_TASK": ""}
  assert resolve(SLURM | hidden).devices is None
  partly = {"CUDA_VISIBLE_DEVICES": "0,1,-1,3", "SLURM_GPUS_ON_NODE": ""}
  with pytest.raises(ProcessError, match="4 tasks of Slurm share 2 GPUs"):
    resolve(SLURM | partly)


def test_cyclic_tasks_have_no_known_hosts():
  assert resolve(SLURM | {"SLURM_DISTRIBUTION": "cyclic"}).hosts == ()


def test_what_a_person_says_goes_before_slurm():
  place = resolve(SLURM | JAX)
  assert (place.index, place.count, place.source) == (2, 4, "JAX_*")
  assert place.address == "run-workers-0-0.run:4000"


def test_a_pod_of_an_indexed_job_knows_its_number_and_the_names_of_all():
  given = {k: v for k, v in JAX.items() if k != "JAX_PROCESS_ID"} | {"JOB_COMPLETION_INDEX": "3"}
  place = resolve(given)
  assert (place.index, place.count) == (3, 4)
  assert place.hosts == tuple(f"run-workers-0-{i}" for i in range(4))


def test_hosts_by_name():
  place = resolve(JAX | {"GEMJAX_HOSTS": "a,b"})
  assert place.hosts == ("a", "a", "b", "b") and place.name(2) == "rank 2 (b)"
  with pytest.raises(ProcessError, match="names 3 hosts"):
    resolve(JAX | {"GEMJAX_HOSTS": "a,b,c"})


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"JAX_NUM_PROCESSES": "many"}, "needs all of"),
    ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is 4, but must be below JAX_NUM_PROCESSES, 4"),
    ({"JAX_COORDINATOR_ADDRESS": "host"}, "must be HOST:PORT"),
    ({"JAX_COORDINATOR_ADDRESS": "host:99999"}, "must be HOST:PORT"),
  ],
)
def test_contradictions(change, words):
  with pytest.raises(ProcessError, match=words):
    resolve(JAX | change)
