.PHONY: help setup run test docs-check browser check pins sbom bench bench-growth mutation mutation-schema torture overload failover

help:
	@echo "make setup   make .venv for all of it (PYTHON=python3.13 chooses the Python, 3.11 or newer)"
	@echo "make run     all of it on this machine: database, provider's sandbox, server and worker"
	@echo "make test    the whole suite (ARGS='-k refund' chooses)"
	@echo "make docs-check    what the docs show, run as it stands (needs php, node, curl, openssl, promtool, systemd-analyze)"
	@echo "make browser    the customer's pages in Chromium (ARGS='-k double'; PICTURES=FOLDER keeps what they look like)"
	@echo "make check   lint, types, lines of code, duplicated code, requirements, their lock and their licences"
	@echo "make torture    break all that can break around a running paygate, and check (ARGS='--seed 7 --minutes 30')"
	@echo "make overload   more requests, readers, sockets and garbage than it can take (ARGS='--brisk --faults slow,dear,open')"
	@echo "make failover   PostgreSQL under Patroni while its primary changes (needs etcd; ARGS=--pgbouncer)"
	@echo "make mutation    break each function of the core in a small way; the tests must notice (mutmut; ARGS=\"'refunds.*'\")"
	@echo "make mutation-schema   leave out each guard and rule of schema.sql; the tests must notice (ARGS='-k trigger')"
	@echo "make bench   what a request costs, against the least it could and a Django app (ARGS=--quick: in three minutes)"
	@echo "make bench-growth    whether it costs the same with a million payments (ARGS=--quick: 100 thousand; --full: 5 million)"
	@echo "make sbom    the bill of materials of what runs (CycloneDX), into paygate.cdx.json"
	@echo "make pins    raise the pinned requirements to the newest"

setup:
	@.ci/setup dev $(PYTHON)

run:
	@.ci/setup local $(PYTHON)
	@.venv/bin/python manage.py runserver

test:
	@.ci/setup test $(PYTHON)
	.venv/bin/python manage.py test --numprocesses=2 $(ARGS)

docs-check:
	@.ci/docs-check $(ARGS)

browser:
	@.ci/browser $(ARGS)

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy .
	.venv/bin/python .ci/check.py
	.venv/bin/zizmor --offline --no-progress --quiet .github
	.venv/bin/pylint --disable=all --enable=duplicate-code --score=n *.py web commands local tests

torture:
	@.ci/setup test $(PYTHON)
	.venv/bin/python -m proofs.torture $(ARGS)

overload:
	@.ci/setup test $(PYTHON)
	.venv/bin/python -m proofs.torture --overload $(ARGS)

failover:
	@.ci/setup test $(PYTHON)
	.venv/bin/python -m proofs.torture.failover $(ARGS)

# Of each function the first break; ARGS="'refunds.*'" tries all of a module.
mutation:
	@.ci/setup mutation $(PYTHON)
	.venv/bin/mutmut run --max-children 2 $(or $(ARGS),'*__mutmut_1')
	.venv/bin/mutmut results

mutation-schema:
	@.ci/setup test $(PYTHON)
	.venv/bin/python -m pytest proofs/breaks --numprocesses=2 $(ARGS)

bench:
	@.ci/setup bench $(PYTHON)
	.venv/bin/python -m proofs.bench $(ARGS)

bench-growth:
	@.ci/setup test $(PYTHON)
	.venv/bin/python -m proofs.bench.growth $(ARGS)

sbom:
	@.ci/setup sbom $(PYTHON)
	.venv/bin/cyclonedx-py requirements requirements.txt --pyproject pyproject.toml --output-reproducible -o paygate.cdx.json

# --universal: one lock for every platform and every Python from 3.11 on. Each binds those after it.
LOCKS = run local test $(filter-out run local test,$(basename $(notdir $(wildcard requirements/*.in))))

pins: setup
	for lock in $(LOCKS); do \
		into=requirements/$$lock.txt; [ $$lock = run ] && into=requirements.txt; \
		.venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
			requirements/$$lock.in -o $$into || exit 1; \
	done
