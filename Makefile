.PHONY: help setup run test check pins

help:
	@echo "make setup   make .venv alone (PYTHON=python3.13 chooses the Python, 3.11 or newer)"
	@echo "make run     all of it on this machine: database, provider's sandbox, server and worker"
	@echo "make test    the whole suite (ARGS='-k refund' chooses)"
	@echo "make check   lint, types, lines of code, duplicated code, requirements and their lock"
	@echo "make pins    raise the pinned requirements to the newest"

setup:
	@.ci/setup $(PYTHON)

run: setup
	@.venv/bin/python manage.py runserver

test: setup
	.venv/bin/python manage.py test --numprocesses=2 $(ARGS)

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy .
	.venv/bin/python .ci/check.py
	.venv/bin/pylint --disable=all --enable=duplicate-code --score=n *.py tests

# --universal: one lock for every platform and every Python from 3.11 on.
PIN = .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header

pins: setup
	$(PIN) requirements.in -o requirements.txt
	$(PIN) requirements-dev.in -o requirements-dev.txt
