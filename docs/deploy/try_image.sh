#!/bin/sh
# Start an image of paygate against PostgreSQL, take a payment in the sandbox, and stop it: try_image.sh IMAGE
#
# Everything shares this machine's network, because the sandbox listens on loopback alone. Needs Docker, and Python with
# requirements.txt. Ends with status 0 when the payment was completed and the container ended cleanly.
set -eu
cd "$(dirname "$0")/../.."
image=$1
export PAYSTACK_SECRET_KEY=sk_test_0123456789abcdef # the sandbox's

sandbox=
finish() {
    docker rm --force paygate-try paygate-try-database >/dev/null 2>&1 || true
    [ -z "$sandbox" ] || kill "$sandbox" 2>/dev/null || true
}
trap finish EXIT

docker run --detach --name paygate-try-database --network host --env POSTGRES_USER=paygate \
    --env POSTGRES_HOST_AUTH_METHOD=trust postgres:18-trixie -c listen_addresses=127.0.0.1 -c port=5433 >/dev/null
tries=0
# Over TCP: while the image initialises its data, the server listens on its socket alone.
until docker exec paygate-try-database pg_isready --quiet --host=127.0.0.1 --port=5433 --username=paygate; do
    tries=$((tries + 1))
    [ "$tries" -lt 60 ] || { docker logs paygate-try-database; exit 1; }
    sleep 1
done

python -m local.sandbox --port 8010 --webhook-url http://127.0.0.1:8000/api/v1/webhooks/paystack &
sandbox=$!

docker run --detach --name paygate-try --network host --read-only --cap-drop ALL --security-opt no-new-privileges \
    --env DATABASE_URL=postgresql://paygate@127.0.0.1:5433/paygate --env PAYSTACK_SECRET_KEY \
    --env PAYSTACK_URL=http://127.0.0.1:8010 --env PUBLIC_URL=http://127.0.0.1:8000 "$image" >/dev/null
python docs/deploy/take_a_payment.py --paygate http://127.0.0.1:8000 --sandbox http://127.0.0.1:8010 || {
    docker logs paygate-try
    exit 1
}

docker stop --time 30 paygate-try >/dev/null
status=$(docker inspect --format '{{.State.ExitCode}}' paygate-try)
docker image inspect --format "$image: {{.Size}} bytes, user {{.Config.User}}" "$image"
[ "$status" = 0 ] || { docker logs paygate-try; echo "it ended with status $status" >&2; exit 1; }
