.PHONY: help setup run test browser check pins sbom bench bench-scale bench-drain bench-growth mutation image-check torture overload failover

help:
	@echo "make setup   make .venv alone (PYTHON=python3.13 chooses the Python, 3.11 or newer)"
	@echo "make run     all of it on this machine: database, provider's sandbox, server and worker"
	@echo "make test    the whole suite (ARGS='-k refund' chooses)"
	@echo "make browser    the customer's pages in Chromium (ARGS='-k double'; PICTURES=FOLDER keeps what they look like)"
	@echo "make check   lint, types, lines of code, duplicated code, requirements, their lock and their licences"
	@echo "make torture    break all that can break around a running paygate, and check (ARGS='--seed 7 --minutes 30')"
	@echo "make overload   more requests, readers, sockets and garbage than it can take"
	@echo "make failover   PostgreSQL under Patroni while its primary changes (ARGS=--pgbouncer; as root it installs what it needs)"
	@echo "make mutation    break the code in 300 small ways; the tests must notice (ARGS='--seed 7 --sample 50')"
	@echo "make bench   what a request costs, against the least it could and a Django app (ARGS=--quick: without it, in two minutes)"
	@echo "make bench-scale   what it costs with more processes on one database (ARGS=--quick: in about two minutes)"
	@echo "make bench-drain   100,000 looks and notifications after an outage (ARGS=--quick: in a minute)"
	@echo "make bench-growth    whether it costs the same with a million payments (ARGS=--quick: 100 thousand; --full: 5 million)"
	@echo "make image-check   replay the Dockerfile without Docker, take a payment, stop it (Linux, as root)"
	@echo "make sbom    the bill of materials of what runs (CycloneDX), into paygate.cdx.json"
	@echo "make pins    raise the pinned requirements to the newest"

setup:
	@.ci/setup $(PYTHON)

run: setup
	@.venv/bin/python manage.py runserver

test: setup
	.venv/bin/python manage.py test --numprocesses=2 $(ARGS)

browser: setup
	.ci/browser $(ARGS)

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy .
	.venv/bin/python .ci/check.py
	.venv/bin/pylint --disable=all --enable=duplicate-code --score=n *.py tests

torture: setup
	.venv/bin/python -m torture $(ARGS)

overload: setup
	.venv/bin/python -m torture --overload $(ARGS)

failover: setup
	.venv/bin/python -m torture.failover $(ARGS)

mutation: setup
	@.ci/mutation $(ARGS)

bench: setup
	.venv/bin/python -m bench $(ARGS)

bench-scale: setup
	.venv/bin/python -m bench.scale $(ARGS)

bench-drain: setup
	.venv/bin/python -m bench.drain $(ARGS)

bench-growth: setup
	.venv/bin/python -m bench.growth $(ARGS)

image-check: setup
	.venv/bin/python -m deploy.replay_dockerfile $(ARGS)

sbom: setup
	@.ci/sbom

# --universal: one lock for every platform and every Python from 3.11 on. The first two bind the others.
LOCKS = requirements requirements-dev $(filter-out requirements requirements-dev,$(basename $(wildcard requirements*.in)))

pins: setup
	for lock in $(LOCKS); do \
		.venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
			$$lock.in -o $$lock.txt || exit 1; \
	done
