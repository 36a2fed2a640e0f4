from django.apps import AppConfig


class Payments(AppConfig):
    name = "bench.django_app"
    label = "payments"

    def ready(self) -> None:
        from bench.django_app import receivers  # noqa: F401  # connects them, as Django's documentation shows
