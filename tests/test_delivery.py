"""What is delivered beside the code: the image, the platforms' files, the workflows, the settings to copy."""
# ruff: noqa: F811  # a fixture bears the name of its import

import fnmatch
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import settings
from local import embedded
from local.sandbox import Sandbox
from shop import ROOT, SECRET_KEY, Shop, free_port, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, till  # noqa: F401  # fixtures

COMPOSE_ALONE = {"POSTGRES_PASSWORD"}
Stage = tuple[str, list[tuple[str, str]]]


def read_dockerfile(text: str) -> list[Stage]:
    """The base of each stage, and its instructions in order. Comments are dropped, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    stages: list[Stage] = []
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        word, _, argument = line.strip().partition(" ")
        if word == "FROM":
            stages.append((argument.partition(" AS ")[0].strip(), []))
        elif word:
            stages[-1][1].append((word, argument.strip()))
    return stages


STAGES = read_dockerfile((ROOT / "Dockerfile").read_text())
IMAGE = dict(STAGES[-1][1])
COPIED = [
    source
    for _, steps in STAGES
    for word, argument in steps
    if word == "COPY" and not argument.startswith("--from")
    for source in argument.split()[:-1]
]


def is_copied(path: Path) -> bool:
    """Whether the Dockerfile copies this file, or a folder that it is in, out of the project's folder."""
    parts = {str(part): len(part.parts) for part in (path, *path.parents)}
    return any(
        fnmatch.fnmatchcase(part, source) and depth == len(Path(source).parts)
        for part, depth in parts.items()
        for source in COPIED
    )


def build_context() -> list[Path]:
    """The project's files that the build copies."""
    files = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*")) if path.is_file()]
    return [path for path in files if is_copied(path)]


def read_yaml(path: str) -> list[Any]:
    """The documents in a file. PyYAML comes without types."""
    return list(importlib.import_module("yaml").safe_load_all((ROOT / path).read_text(encoding="utf-8")))


# .env.example


def example() -> dict[str, str]:
    """Each name in .env.example, commented out or not, with the value that it shows."""
    return dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))


def test_env_example_lists_every_setting_and_no_other() -> None:
    code = (ROOT / "settings.py").read_text()
    assert set(example()) - COMPOSE_ALONE == set(re.findall(r'env(?:\.get\(|, )"([A-Z_]+)"', code))


def test_env_example_shows_the_defaults() -> None:
    needed = {"DATABASE_URL": "postgresql://shop@db.example.com/pay", "PAYSTACK_SECRET_KEY": SECRET_KEY}
    shown = {name: value for name, value in example().items() if value}
    assert len(shown) > 15
    assert settings.load({**shown, **needed}) == settings.load(needed)


def test_env_example_copied_as_it_is_sets_nothing_yet() -> None:
    env = settings.environment(ROOT / ".env.example", {})
    assert env == {}
    with pytest.raises(settings.Invalid, match="PAYSTACK_SECRET_KEY is missing"):
        settings.load(env)


def test_env_example_has_a_line_for_each_setting() -> None:
    blocks = re.findall(r"^((?:# .+\n)*)#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert [name for comment, name in blocks if not comment] == []


# The image


def test_the_image_is_small_by_stages_and_runs_as_nobody_in_particular() -> None:
    bases = [base for base, _ in STAGES]
    assert len(bases) > 1
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?|base", base) for base in bases)
    assert IMAGE["USER"].isdigit()  # Kubernetes cannot tell otherwise that it is not root
    assert int(IMAGE["USER"]) > 0
    assert "HOST=0.0.0.0" in shlex.split(IMAGE["ENV"])


def test_the_images_commands_need_no_shell_around_them() -> None:
    command, check = json.loads(IMAGE["CMD"]), json.loads(IMAGE["HEALTHCHECK"].partition("CMD ")[2])
    assert "exec gunicorn" in command[-1]
    assert check[0] == "python"
    assert IMAGE["STOPSIGNAL"] == "SIGTERM"


def test_every_package_of_the_image_is_hashed() -> None:
    installs = [argument for _, steps in STAGES for word, argument in steps if word == "RUN" and "pip" in argument]
    assert len(installs) == 2
    assert all("--require-hashes" in argument and "--only-binary :all:" in argument for argument in installs)


@pytest.mark.parametrize(
    "name", [".env", ".git/config", ".paygate/sandbox/secret-key", "tests/shop.py", "local/sandbox/server.py"]
)
def test_the_image_never_has(name: str) -> None:
    assert not is_copied(Path(name))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with what the Dockerfile copies out of the project's, and nothing else."""
    for path in build_context():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def commands() -> dict[str, list[str]]:
    """How each platform starts it."""
    procfile = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    [render] = read_yaml("render.yaml")
    return {
        "Dockerfile": json.loads(IMAGE["CMD"]),
        "Procfile": ["bash", "-c", f"{procfile['release']} && {procfile['web']}"],
        "render.yaml": shlex.split(render["services"][0]["dockerCommand"]),
    }


@pytest.mark.parametrize("platform", commands())
def test_the_command_migrates_takes_a_payment_and_ends_when_asked(
    platform: str, image: Path, sandbox: Sandbox, cluster: embedded.Cluster
) -> None:
    port = free_port()
    sandbox.configure(webhook_url=f"http://127.0.0.1:{port}/api/v1/webhooks/paystack")
    env = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": "/nonexistent",
        "DATABASE_URL": cluster.url,
        "PAYSTACK_SECRET_KEY": SECRET_KEY,
        "PAYSTACK_URL": sandbox.url,
        # Render names itself; everyone else is told.
        ("RENDER_EXTERNAL_URL" if platform == "render.yaml" else "PUBLIC_URL"): "https://pay.example.com",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "WEB_CONCURRENCY": "1",
    }
    log = image / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(commands()[platform], cwd=image, env=env, stdout=output, stderr=output)
    try:
        script = [sys.executable, str(ROOT / "docs" / "deploy" / "take_a_payment.py")]
        subprocess.run([*script, f"--paygate=http://127.0.0.1:{port}", f"--sandbox={sandbox.url}"], check=True)
        health = json.loads(IMAGE["HEALTHCHECK"].partition("CMD ")[2])
        assert subprocess.run(health, env=env, check=False).returncode == 0
        process.terminate()
        assert process.wait(15) == 0, log.read_text()
        assert subprocess.run(health, env=env, check=False, capture_output=True).returncode != 0
    finally:
        process.kill()
        process.wait()


# Where it runs


def graceful_seconds() -> float:
    """How long gunicorn lets a stopping process finish, with the defaults."""
    env = {"PATH": os.environ["PATH"], "DATABASE_URL": "postgresql://db/pay", "PAYSTACK_SECRET_KEY": SECRET_KEY}
    program = "import runpy; print(runpy.run_path('gunicorn.conf.py')['graceful_timeout'])"
    env["PYTHONPATH"] = str(ROOT)
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    ).stdout
    return float(printed)


def test_every_platform_gives_the_requests_under_way_time_to_end() -> None:
    needed = graceful_seconds()
    [compose], [render] = read_yaml("compose.yaml"), read_yaml("render.yaml")
    pod = deployment()["spec"]["template"]["spec"]
    pre_stop = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    unit = (ROOT / "docs" / "deploy" / "paygate.service").read_text()
    assert float(compose["services"]["paygate"]["stop_grace_period"].removesuffix("s")) > needed
    assert render["services"][0]["maxShutdownDelaySeconds"] > needed
    assert pod["terminationGracePeriodSeconds"] > needed + pre_stop
    assert float(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) > needed


def test_compose_starts_after_its_database_and_keeps_it() -> None:
    [compose] = read_yaml("compose.yaml")
    paygate, database = compose["services"]["paygate"], compose["services"]["database"]
    assert paygate["depends_on"]["database"]["condition"] == "service_healthy"
    assert paygate["environment"]["HOST"] == "0.0.0.0"  # noqa: S104
    assert "pg_isready" in database["healthcheck"]["test"]
    assert re.fullmatch(r"postgres:(1[5-8])-\w+", database["image"])
    volumes = [
        volume.split(":")[0]
        for service in (database, paygate, compose["services"]["caddy"])
        for volume in service["volumes"]
        if not volume.startswith(".")
    ]
    assert volumes == list(compose["volumes"]) == ["database", "backups", "caddy"]
    assert "${POSTGRES_PASSWORD:?" in paygate["environment"]["DATABASE_URL"]
    assert paygate["env_file"] == ".env"


def test_a_backup_is_made_once_a_day_by_a_command_that_works(shop: Shop, till: Till, tmp_path: Path) -> None:
    [compose] = read_yaml("compose.yaml")
    job = next(each for each in read_yaml("docs/deploy/kubernetes.yaml") if each["kind"] == "CronJob")["spec"]
    container = job["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    unit = (ROOT / "docs/deploy/paygate-backup.service").read_text()
    assert "OnCalendar=daily" in (ROOT / "docs/deploy/paygate-backup.timer").read_text()
    assert job["schedule"].endswith("* * *")
    assert "sleep 86400" in compose["services"]["backup"]["command"][-1]
    for text in (compose["services"]["backup"]["command"][-1], " ".join(container["command"]), unit):
        [(folder, keep)] = re.findall(r"manage\.py backup (/[\w/-]+) --keep (\d+)", text)
        made = till.did("backup", str(tmp_path), "--keep", keep)
        assert (folder, made.startswith(f"{tmp_path}/paygate-")) == (folder, True)
        for path in tmp_path.iterdir():
            path.unlink()
    assert compose["services"]["backup"]["volumes"] == ["backups:/backups"]


def test_one_command_puts_a_certificate_in_front() -> None:
    [compose] = read_yaml("compose.yaml")
    paygate, caddy = compose["services"]["paygate"], compose["services"]["caddy"]
    assert caddy["profiles"] == ["tls"]
    assert caddy["environment"] == {"PUBLIC_URL": "${PUBLIC_URL:?set it in .env}", "PAYGATE": "paygate:8000"}
    assert "./docs/deploy/Caddyfile:/etc/caddy/Caddyfile:ro" in caddy["volumes"]
    assert paygate["environment"]["TRUSTED_PROXIES"] == "${TRUSTED_PROXIES:-1}"
    assert "docker compose --profile tls up --detach --build" in (ROOT / "compose.yaml").read_text()


def test_compose_serves_by_a_role_that_is_no_superuser() -> None:
    [compose] = read_yaml("compose.yaml")
    database, made = compose["services"]["database"], (ROOT / "docs" / "deploy" / "role.sql").read_text()
    assert "POSTGRES_USER" not in database["environment"]  # the image would make a superuser of it
    assert "./docs/deploy/role.sql:/docker-entrypoint-initdb.d/role.sql:ro" in database["volumes"]
    assert "//paygate:" in compose["services"]["paygate"]["environment"]["DATABASE_URL"]
    assert re.search(r"^CREATE ROLE paygate LOGIN PASSWORD :'password';$", made, re.MULTILINE)
    assert "ALTER ROLE postgres PASSWORD NULL;" in made


def test_no_service_of_compose_may_more_than_it_must() -> None:
    [compose] = read_yaml("compose.yaml")
    for service in compose["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["pids_limit"] <= 512
        assert service["mem_limit"] in ("512m", "1g")
    assert {name: each["cap_add"] for name, each in compose["services"].items() if "cap_add" in each} == {
        "caddy": ["NET_BIND_SERVICE"]
    }
    assert compose["services"]["database"]["user"] == "postgres"


def test_the_platforms_trust_exactly_their_own_router() -> None:
    [render] = read_yaml("render.yaml")
    env = {each["key"]: each for each in render["services"][0]["envVars"]}
    assert env["TRUSTED_PROXIES"]["value"] == "1"
    assert env["HOST"]["value"] == "0.0.0.0"  # noqa: S104
    assert env["PAYSTACK_SECRET_KEY"] == {"key": "PAYSTACK_SECRET_KEY", "sync": False}  # asked for, never in the file
    assert env["DATABASE_URL"]["fromDatabase"]["name"] == render["databases"][0]["name"]
    web = (ROOT / "Procfile").read_text()
    assert "TRUSTED_PROXIES=${TRUSTED_PROXIES:-1}" in web
    assert "HOST=${HOST:-0.0.0.0}" in web


def deployment() -> Any:
    return next(each for each in read_yaml("docs/deploy/kubernetes.yaml") if each["kind"] == "Deployment")


def test_kubernetes_runs_it_as_the_restricted_standard_wants() -> None:
    pod = deployment()["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == int(IMAGE["USER"])
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert not pod["automountServiceAccountToken"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"secretRef": {"name": "paygate"}} in container["envFrom"]
    assert pod["initContainers"][0]["command"] == ["python", "manage.py", "migrate"]


def test_kubernetes_lets_its_pods_reach_and_be_reached_by_what_they_need_alone() -> None:
    kinds = {each["kind"]: each.get("spec") for each in read_yaml("docs/deploy/kubernetes.yaml")}
    policy, template = kinds["NetworkPolicy"], kinds["Deployment"]["template"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    for pod in (template, kinds["CronJob"]["jobTemplate"]["spec"]["template"]):
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            assert container["resources"]["limits"]["memory"]
    [served] = template["spec"]["containers"][0]["ports"]
    assert policy["ingress"] == [{"ports": [{"port": served["containerPort"], "protocol": "TCP"}]}]
    [egress] = policy["egress"]
    assert sorted((each["port"], each["protocol"]) for each in egress["ports"]) == [
        (53, "TCP"),
        (53, "UDP"),
        (443, "TCP"),
        (5432, "TCP"),
    ]
    backup = kinds["CronJob"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    assert not kinds["Service"]["selector"].items() <= backup.items()  # it serves nobody


def test_kubernetes_asks_the_right_probes() -> None:
    """A pod whose database is away must get no requests, and must not be killed for it."""
    [container] = deployment()["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["readinessProbe"]["timeoutSeconds"] > 2
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


@pytest.mark.programs
def test_the_systemd_unit_is_sound_and_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "paygate.service"
    text = (ROOT / "docs" / "deploy" / "paygate.service").read_text()
    assert "ExecStartPre=/opt/paygate/.venv/bin/python manage.py migrate" in text
    unit.write_text(re.sub(r"/opt/paygate/.venv/bin/\w+", "/bin/true", text))
    said = subprocess.run(["systemd-analyze", "verify", unit], check=False, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(unit)]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


# Vercel


def test_the_files_for_vercel_serve(tmp_path: Path, database_url: str) -> None:
    page = (ROOT / "docs" / "vercel.md").read_text()
    blocks = dict(re.findall(r"```(python|json)\n(.*?)```", page, re.DOTALL))
    entry = tmp_path / "api" / "index.py"
    entry.parent.mkdir()
    entry.write_text(blocks["python"])
    assert list(json.loads(blocks["json"])["functions"]) == ["api/index.py"]
    for path in build_context():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    program = (
        "import runpy, falcon.testing\n"
        "app = runpy.run_path('api/index.py')['app']\n"
        "client = falcon.testing.TestClient(app)\n"
        "print(client.simulate_get('/readyz').status_code, app.settings.public_url)\n"
        "app.database.close()\n"
    )
    env = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": database_url,
        "PAYSTACK_SECRET_KEY": SECRET_KEY,
        "HOST": "0.0.0.0",  # noqa: S104
        "VERCEL_PROJECT_PRODUCTION_URL": "shop.vercel.app",
    }
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, check=False, capture_output=True, text=True
    )
    assert said.stdout.split() == ["200", "https://shop.vercel.app"], said.stderr


# The workflows

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    assert [line for line in uses if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_no_more_than_it_must(path: Path) -> None:
    [workflow] = read_yaml(str(path))
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        publishing = {"packages": "write", "id-token": "write", "attestations": "write"}
        assert job["permissions"] in ({"contents": "read"}, publishing)
        for step in job["steps"]:
            assert "${{" not in step.get("run", "")  # what is put into a script there is run
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_ci_tries_every_python_that_is_promised() -> None:
    [workflow] = read_yaml(".github/workflows/ci.yml")
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert triggers["push"]["branches"] == triggers["pull_request"]["branches"] == ["main"]
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert {"make check", "make test"} <= {step.get("run") for step in job["steps"]}
    assert any("pip-audit --" in step.get("run", "") for step in workflow["jobs"]["audit"]["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_installs_is_hashed(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if re.search(r"\b(pip3?|uv|pipx|npm) .*install\b", line)]
    assert [line for line in lines if "--require-hashes" not in line] == []
    assert "--require-hashes" in (ROOT / ".ci" / "setup").read_text()  # what make installs


def test_an_image_is_published_only_when_it_took_a_payment_and_a_person_agreed() -> None:
    [workflow] = read_yaml(".github/workflows/deploy.yml")
    assert list(workflow[True]) == ["push"]
    assert list(workflow[True]["push"]) == ["tags"]
    image, publish = workflow["jobs"]["image"], workflow["jobs"]["publish"]
    assert "sh docs/deploy/try_image.sh paygate" in [step.get("run") for step in image["steps"]]
    assert publish["needs"] == "image"
    assert publish["environment"] == "publish"
    assert not any(
        "checkout" in step.get("uses", "") or "docker build" in step.get("run", "") for step in publish["steps"]
    )


def test_the_published_image_is_attested() -> None:
    [workflow] = read_yaml(".github/workflows/deploy.yml")
    image, publish = ([step for step in job["steps"] if "uses" in step] for job in workflow["jobs"].values())
    [build] = [step["with"] for step in image if step["uses"].startswith("docker/build-push-action@")]
    assert (build["provenance"], build["sbom"]) == ("mode=max", True)
    [attest] = [step["with"] for step in publish if step["uses"].startswith("actions/attest-build-provenance@")]
    assert attest["subject-digest"] == "${{ steps.push.outputs.digest }}"
    assert attest["push-to-registry"]


FAKES = {
    "docker": "#!/bin/sh\ncat > /dev/null\n",
    "skopeo": """#!/bin/sh
echo "$@" >> calls
if [ "$1" = copy ]; then printf sha256:0 > digest
else printf '{"Tags": ["latest", "sha256-0", "0.9.9", "1.9.0", "%s", "1.10.0"]}' "${GITHUB_REF_NAME#v}"; fi
""",
    "jq": f"""#!/bin/sh
exec {shlex.quote(sys.executable)} -c 'import json, sys; print(*json.load(sys.stdin)["Tags"], sep="\\n")'
""",
}


@pytest.mark.parametrize(("version", "is_newest"), [("1.10.0", True), ("1.11.0", True), ("1.9.1", False)])
def test_latest_is_the_newest_release_and_no_other(version: str, is_newest: bool, tmp_path: Path) -> None:
    [workflow] = read_yaml(".github/workflows/deploy.yml")
    [push] = [step["run"] for step in workflow["jobs"]["publish"]["steps"] if step.get("id") == "push"]
    for name, script in FAKES.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "TOKEN": "x",
        "GITHUB_ACTOR": "x",
        "GITHUB_REPOSITORY": "Shop/Paygate",
        "GITHUB_REF_NAME": f"v{version}",
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }
    subprocess.run(["bash", "-e", "-o", "pipefail", "-c", push], cwd=tmp_path, env=env, check=True)
    pushed = [line.split()[-1] for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("copy")]
    names = [version, "latest"] if is_newest else [version]
    assert pushed == [f"docker://ghcr.io/shop/paygate:{name}" for name in names]
    assert (tmp_path / "output").read_text() == "name=ghcr.io/shop/paygate\ndigest=sha256:0\n"
