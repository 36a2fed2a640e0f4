-- Run once by compose.yaml's database, on an empty volume: paygate's role owns its database and is no superuser. The
-- superuser has no password, so nobody comes in as it over the network.
\getenv password POSTGRES_PASSWORD
CREATE ROLE paygate LOGIN PASSWORD :'password';
CREATE DATABASE paygate OWNER paygate;
ALTER ROLE postgres PASSWORD NULL;
