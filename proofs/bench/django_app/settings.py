"""Those of `django-admin startproject`, for production; REST Framework's and paystack-django's are their defaults."""

import os

from psycopg.conninfo import conninfo_to_dict

database = conninfo_to_dict(os.environ["DATABASE_URL"])

SECRET_KEY = "only-for-this-measurement-on-this-machine-0123456789"  # noqa: S105  # it signs nothing that anyone keeps
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "djpaystack",
    "proofs.bench.django_app",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "proofs.bench.django_app.api"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": database["dbname"],
        "USER": database["user"],
        "HOST": database["host"],
        "PORT": database["port"],
        # Persistent connections (CONN_MAX_AGE) would be one a thread, more than PostgreSQL allows by default: the pool
        # that Django has for psycopg, as large as the others'.
        "OPTIONS": {"pool": {"min_size": 1, "max_size": int(os.environ["DB_POOL"])}},
    }
}
TIME_ZONE = "UTC"
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

PAYSTACK = {
    "SECRET_KEY": os.environ["PAYSTACK_SECRET_KEY"],
    "PUBLIC_KEY": "pk_test_0123456789abcdef",
    "ENVIRONMENT": "test",
    "BASE_URL": os.environ["PAYSTACK_URL"],
}
