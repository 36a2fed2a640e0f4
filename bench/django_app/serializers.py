from rest_framework import serializers

from bench.django_app.models import Payment


class PaymentSerializer(serializers.ModelSerializer):
    class Meta:
        model = Payment
        fields = (
            "id",
            "customer_name",
            "customer_email",
            "customer_phone",
            "amount",
            "location",
            "status",
            "currency",
            "reference",
            "checkout_url",
            "created_at",
            "paid_at",
        )
        read_only_fields = ("status", "currency", "reference", "checkout_url", "paid_at")
