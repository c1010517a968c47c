"""The files beside the launch scripts: JobSet, SkyPilot, the image, and the flags that are set."""

import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
CHIPS_OF_A_HOST = 4
# Keys of SkyPilot's task files; a misspelt one would be refused there.
SKY = {
  "name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run",
}
SKY_RESOURCES = {
  "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot",
  "disk_size", "disk_tier", "image_id", "ports", "labels", "any_of", "ordered", "job_recovery",
}


def _flags(text):
  """What a command gives the training, after --."""
  return dict(re.findall(r"--([\w.]+)=(\S+)", text.split(" -- ", 1)[1]))


def _check_training(flags):
  """Files on the mounted bucket, and keys that the config has."""
  from configs import unigrpo

  assert flags.pop("config") == "configs/unigrpo.py"
  assert flags.pop("workdir").startswith("bucket/")
  config = unigrpo.get_config()
  for name, value in flags.items():
    section = config
    if name == "config.rewards":  # a value for the shell, or for YAML
      continue
    for key in name.removeprefix("config.").split("."):
      section = section[key]  # KeyError: no such key
    assert value.startswith("bucket/")


@pytest.fixture(scope="module")
def jobset():
  values = {"NAME": "run", "IMAGE": "image", "BUCKET": "b", "SERVICE_ACCOUNT": "account"}
  text = (LAUNCH / "jobset.yaml").read_text()
  names = set(re.findall(r"\$\{(\w+)\}", text))
  assert names == values.keys() and all(f"${name}" in text.split("apiVersion")[0] for name in names)
  for name, value in values.items():
    text = text.replace(f"${{{name}}}", value)
  return yaml.safe_load(text)


def test_jobset_is_one(jobset):
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset.keys() == {"apiVersion", "kind", "metadata", "spec"}
  assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
  assert jobset["metadata"]["annotations"] == {
    "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
  }
  [job] = jobset["spec"]["replicatedJobs"]
  assert job.keys() == {"name", "replicas", "template"} and job["replicas"] == 1
  assert job["template"].keys() == {"spec"} and {"metadata", "spec"} == set(
    job["template"]["spec"]["template"]
  )


def _job(jobset):
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_jobset_has_a_pod_for_every_host_of_the_topology(jobset):
  job = _job(jobset)
  pod = job["template"]["spec"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  chips = math.prod(int(side) for side in topology.split("x"))
  [container] = pod["containers"]
  limit = container["resources"]["limits"]["google.com/tpu"]
  assert limit == CHIPS_OF_A_HOST
  assert job["completions"] == job["parallelism"] == chips // limit
  assert job["completionMode"] == "Indexed"
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
  # A label is a string: YAML's true would be refused.
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert {t["key"] for t in pod["tolerations"]} == {"cloud.google.com/gke-spot", "google.com/tpu"}


def test_jobset_restarts_what_was_taken_away_but_not_what_was_refused(jobset):
  job, policy = _job(jobset), jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] >= 100
  # A pod fails its job, and no pod is put in its place alone.
  assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
  [rule] = job["podFailurePolicy"]["rules"]
  [container] = job["template"]["spec"]["containers"]
  assert rule == {"action": "FailJob", "onExitCodes": {
    "containerName": container["name"], "operator": "In", "values": [2]
  }}
  assert policy["rules"] == [
    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]


def test_jobset_runs_the_training_on_the_bucket(jobset):
  template = _job(jobset)["template"]
  pod = template["spec"]
  [container] = pod["containers"]
  command = " ".join([*container["command"], *container["args"]])
  assert command.startswith("bash launch/host.sh run --backend=tpu -- ")
  _check_training(_flags(command))
  # The driver's sidecar comes with the annotation only.
  assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
  volume = pod["volumes"][0]["csi"]
  assert volume["volumeAttributes"]["bucketName"] == "b"
  mounted = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}["bucket"]
  assert mounted == f"{container['workingDir']}/bucket"
  given = {re.sub(r".*:(?=\w[\w-]*:\d)", "", option).replace(":", "=")
           for option in volume["volumeAttributes"]["mountOptions"].split(",")}
  script = (LAUNCH / "host.sh").read_text()
  by_host = set(re.search(r"gcsfuse (--implicit[^\"]*)", script)[1].replace("\\", "").split())
  assert {f"--{option}" for option in given} == {
    flag.replace("metadata-cache-", "") for flag in by_host
  }


def test_the_image_has_what_the_jobset_needs(jobset):
  [container] = _job(jobset)["template"]["spec"]["containers"]
  text = (LAUNCH / "Dockerfile").read_text()
  assert f"WORKDIR {container['workingDir']}\n" in text
  assert "REQUIREMENTS=requirements-tpu.txt bash -e launch/venv.sh" in text
  copied = re.search(r"^COPY (requirements.*) \./$", text, re.MULTILINE)[1].split()
  assert all((ROOT / name).is_file() for name in copied)
  # The machine's own .venv must not lie over the image's.
  assert ".venv" in (LAUNCH / "Dockerfile.dockerignore").read_text().split()


def test_sky_file():
  task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  assert task.keys() <= SKY and task["resources"].keys() <= SKY_RESOURCES
  assert task["resources"]["use_spot"] is True
  assert task["envs"] == {"BUCKET": None}  # must be given
  generation, runtime = "v5p", "v2-alpha-tpuv5"
  assert task["resources"]["accelerators"].startswith(f"tpu-{generation}-")
  assert task["resources"]["accelerator_args"]["runtime_version"] == runtime
  assert f"{generation}-*) version={runtime} ;;" in (LAUNCH / "gcloud.sh").read_text()
  for part in ("setup", "run"):
    subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
  assert 'host.sh run --backend=tpu --bucket="$BUCKET"' in task["run"]
  _check_training(_flags(task["run"].replace("\\\n", "")))


def _environment(backend, **given):
  """What sourcing env.sh adds to an environment that has `given`."""
  shown = subprocess.run(
    ["bash", "-c", f"source launch/env.sh {backend} && env -0"], cwd=ROOT, text=True, check=True,
    capture_output=True, env={"PATH": os.environ["PATH"], **given},
  ).stdout
  return dict(pair.split("=", 1) for pair in shown.split("\0") if pair)


def _starts(**environment):
  program = "import jax; jax.devices()"
  return subprocess.run(
    [sys.executable, "-c", program], text=True, capture_output=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
  )


def test_flags_for_gpus_are_known_to_xla():
  flags = _environment("gpu")["XLA_FLAGS"]
  assert _starts(XLA_FLAGS=flags).returncode == 0
  # Or nothing would have been shown.
  unknown = _starts(XLA_FLAGS=f"{flags} --xla_gpu_no_such_flag=true")
  assert unknown.returncode != 0 and "xla_gpu_no_such_flag" in unknown.stderr


def test_flags_that_are_given_come_last():
  assert _environment("gpu", XLA_FLAGS="--a=1")["XLA_FLAGS"].endswith(" --a=1")
  assert _environment("tpu", LIBTPU_INIT_ARGS="--a=1")["LIBTPU_INIT_ARGS"].endswith(" --a=1")
  given = _environment("gpu", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", NCCL_DEBUG="INFO")
  assert (given["XLA_PYTHON_CLIENT_MEM_FRACTION"], given["NCCL_DEBUG"]) == ("0.5", "INFO")


def test_a_cpu_gives_no_memory_back_between_runs_of_a_program():
  names = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
  assert [_environment("cpu")[name] for name in names] == ["0", "-1"]
  assert _environment("cpu", MALLOC_MMAP_MAX_="9")["MALLOC_MMAP_MAX_"] == "9"
  assert not set(names) & set(_environment("tpu"))


def test_a_tpu_gets_no_flags_for_gpus_nor_the_other_way_round():
  assert "XLA_FLAGS" not in _environment("tpu")
  assert "LIBTPU_INIT_ARGS" not in _environment("gpu")
